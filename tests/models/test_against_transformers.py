"""Same weights, same logits as transformers in fp32, for every family and structural feature."""

from __future__ import annotations

import torch

_OF_IMAGES = ("model.vision_tower.", "model.multi_modal_projector.")


def test_logits_agree(case, tiny, prompt_ids):
    model = tiny(case)
    theirs, ours = model.their_logits(prompt_ids), model.our_logits(prompt_ids)
    assert (ours - theirs).norm() / theirs.norm() < 3e-5  # the contract is 1e-4; about 1e-6 here
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_every_parameter_of_the_checkpoint_is_used(case, tiny):
    model = tiny(case)
    used = {p.source for p in model.weights.parameters.values()}
    unused = {name for name in model.weights.tensors if not name.startswith(_OF_IMAGES)} - used
    assert unused <= ({"lm_head.weight"} if model.spec.tied_head else set())
