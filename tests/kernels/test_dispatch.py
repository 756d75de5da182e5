from saelab import kernels


def test_info_names_every_operation_and_why():
    found = kernels.info()
    assert found["machine"]["device"] == "cpu"
    for op in ("select_topk", "pre_activations_at", "decode"):
        assert hasattr(kernels, op)
        assert found[op]["impl"] == "sparse"
        assert found[op]["why"]
