"""Harvest and train at the outputs of attention heads; the SAE knows its heads, live and from a store."""

import torch

from saelab.models.subject import load_model
from saelab.sae.folder import load_meta, load_sae
from saelab.sae.heads import head_shares, heads_of, recorded_heads
from saelab.workflows.train import TrainJob, run_train
from tests.made import saelab

SITE = "blocks.1.attn.hook_z"
SAE = {"d_sae": 96, "k": 8, "architecture": "topk"}
TRAINING = {"tokens": 4000, "batch_size": 500}


def test_harvest_train_and_read_heads(made, tmp_path, capsys):
    text = ["--text", made / "code.txt", "--tokens.context", 64, "--sites", SITE]
    assert saelab("harvest", "embedded", *text, "--harvest.max_tokens", 5000, "--out", tmp_path / "store") == 0
    (stored,) = run_train(TrainJob(store=str(tmp_path / "store"), sae=SAE, training=TRAINING), tmp_path / "a")
    live = {"model": "embedded", "text": str(made / "code.txt"), "tokens": {"context": 64}, "buffer_rows": 1000}
    (streamed,) = run_train(TrainJob(live=live, site=SITE, sae=SAE, training=TRAINING), tmp_path / "b")
    model = load_model("embedded")
    slices = model.head_slices(SITE)
    for result in (stored, streamed):
        assert heads_of(load_meta(result.path)) == (len(slices), slices[0].stop)
        sae = load_sae(result.path)
        assert sae.d_in == model.width(SITE) == len(slices) * slices[0].stop
        shares = head_shares(sae.W_dec, recorded_heads(result.path))
        assert shares.shape == (96, len(slices))
        by_hand = sae.W_dec[7, slices[2]].norm() / sum(sae.W_dec[7, s].norm() for s in slices)
        torch.testing.assert_close(shares[7, 2], by_hand)
    assert heads_of(load_meta(made / "train" / "sae")) is None
    capsys.readouterr()
    assert saelab("eval", stored.path, "--text", made / "code.txt", "--max_tokens", 2000) == 0
    assert SITE in capsys.readouterr().out
