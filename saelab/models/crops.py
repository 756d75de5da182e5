"""Training rows for pretraining: random crops of the packed documents, a function of (seed, step) and nothing else."""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


class CropSampler:
    """Cuts an endless sequence of training rows out of tokenised documents.

    Each epoch packs the documents in a new order with the separator between them, skips a random offset, cuts rows and
    shuffles them, so that no two epochs share their cuts. A row predicts ``context`` tokens. With probability
    ``bos_share`` it starts with the separator (as rows of an analysis do), otherwise in the middle of running text.

    Args:
        documents: token ids of each document.
        separator: id put between documents and, mostly, at the beginning of a row.
        context: tokens per row.
        bos_share: share of the rows that start with the separator.
        seed: fixes everything.
        repeat_share: share of the rows that are a piece of the text, of an eighth to a half of the row, over and over;
            they reward looking back for what came before, which short training on text alone does too little.
        repeat_from: first row of the endless sequence that may be such a row.

    """

    def __init__(
        self,
        documents: list[Int[np.ndarray, " n"]],
        *,
        separator: int,
        context: int,
        bos_share: float,
        seed: int,
        repeat_share: float = 0.0,
        repeat_from: int = 0,
    ) -> None:
        self.documents = documents
        self.separator = separator
        self.context = context
        self.bos_share = bos_share
        self.seed = seed
        self.repeat_share = repeat_share
        self.repeat_from = repeat_from
        total = sum(len(document) + 1 for document in documents)
        # One context is lost to the random offset, one token to the shift between input and target.
        self.rows_per_epoch = (total - 1 - context) // context
        self._epoch = -1
        self._rows: Int[np.ndarray, "rows width"] = np.zeros((0, context + 1), np.int64)

    def rows(self, first: int, count: int) -> tuple[Int[Tensor, "rows context"], Int[Tensor, "rows context"]]:
        """Return inputs and targets of the rows ``first .. first + count`` of the endless sequence."""
        parts = []
        while count:
            epoch, row = divmod(first, self.rows_per_epoch)
            self._pack(epoch)
            part = self._rows[row : row + count]
            parts.append(part)
            first += len(part)
            count -= len(part)
        rows = torch.from_numpy(np.concatenate(parts))
        return rows[:, :-1], rows[:, 1:]

    def _pack(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        random = np.random.default_rng([self.seed, epoch])
        pieces = []
        for number in random.permutation(len(self.documents)):
            pieces += [np.array([self.separator]), self.documents[number]]
        stream = np.concatenate(pieces)
        offset = int(random.integers(self.context))
        starts = offset + self.context * random.permutation(self.rows_per_epoch)
        rows = stream[starts[:, None] + np.arange(self.context + 1)].astype(np.int64)
        with_bos = random.random(len(rows)) < self.bos_share
        rows[with_bos, 0] = self.separator
        self._repeat(rows, epoch)
        self._rows, self._epoch = rows, epoch

    def _repeat(self, rows: Int[np.ndarray, "rows width"], epoch: int) -> None:
        """Turn some of the rows into a piece of themselves, repeated."""
        # A stream of its own: the other rows are the same with and without repetition.
        random = np.random.default_rng([self.seed, epoch, 1])
        chosen = random.random(len(rows)) < self.repeat_share
        chosen &= epoch * self.rows_per_epoch + np.arange(len(rows)) >= self.repeat_from
        lengths = random.integers(max(1, self.context // 8), self.context // 2 + 1, len(rows))
        for at in np.flatnonzero(chosen):
            rows[at, 1:] = np.resize(rows[at, 1 : 1 + lengths[at]], self.context)
