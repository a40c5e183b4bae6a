"""Transformers' Phi under PyTorch's AdamW, on the same batches, gives our loss curve."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megaphi.config import Recipe
from megaphi.data.samples import train_dataset
from megaphi.formats.hf import to_hugging_face
from megaphi.model.init import initial_value
from megaphi.model.phi import Phi
from megaphi.optim.schedule import learning_rate
from tests.helpers import metrics, toy_options

transformers = pytest.importorskip("transformers")


def their_model(recipe: Recipe) -> torch.nn.Module:
    """Transformers' model with the weights that our run starts from."""
    config = transformers.PhiConfig(
        vocab_size=recipe.model.vocab_size,
        hidden_size=recipe.model.hidden_size,
        intermediate_size=recipe.model.ffn_size,
        num_hidden_layers=recipe.model.num_layers,
        num_attention_heads=recipe.model.num_heads,
        max_position_embeddings=recipe.model.max_sequence_length,
    )
    model = transformers.PhiForCausalLM(config)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Phi(recipe.model).named_parameters()}
    ours = {n: initial_value(n, s, recipe.model, recipe.train.seed) for n, s in shapes.items()}
    model.load_state_dict(
        {
            their_name: tensor
            for name, value in ours.items()
            for their_name, tensor in to_hugging_face(name, value, recipe.model)
        }
    )
    return model


def test_loss_curve_equals_transformers(
    toy_tokens: Path, tmp_path: Path, train_here: Callable[[list[str]], Recipe]
) -> None:
    options = toy_options(
        toy_tokens, tmp_path / "run", model__residual_dropout=0, model__attention_dropout=0
    )
    recipe = train_here(options)
    ours = [(r["loss"], r["grad_norm"]) for r in metrics(tmp_path / "run") if "loss" in r]

    model = their_model(recipe)
    decays = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decays}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
    )
    data = train_dataset(recipe, 0)
    for step in range(1, recipe.train.steps + 1):
        rows = torch.stack([torch.from_numpy(data[8 * (step - 1) + i]) for i in range(8)])
        logits = model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        optimizer.step()
        assert ours[step - 1][0] == pytest.approx(float(loss.detach()), rel=1e-5), step
        assert ours[step - 1][1] == pytest.approx(float(norm), rel=1e-3), step
