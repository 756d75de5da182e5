"""Where the arrays of a feature store are; see :mod:`saelab.features.store` for what they hold."""

IDS, KEEP, ROW_OFFSETS = "tokens/ids.npy", "tokens/keep.npy", "tokens/row_offsets.npy"
INDPTR, INDICES, VALUES = "by_token/indptr.npy", "by_token/indices.npy", "by_token/values.npy"
F_INDPTR, F_TOKENS, F_VALUES = "by_feature/indptr.npy", "by_feature/tokens.npy", "by_feature/values.npy"
TOP_INDPTR, TOP_ENTRIES = "top/indptr.npy", "top/entries.npy"
TOP_ROWS_INDPTR, TOP_ROWS_ENTRIES = "top/rows_indptr.npy", "top/rows_entries.npy"
SUMMARY = "summary"
