"""The same model in Hugging Face transformers, trained as a careful user would train it.

`PhiForCausalLM` with SDPA attention, fp32 weights under bf16 autocast (what their Trainer's
`bf16=True` does; master weights and moments are fp32, as ours), PyTorch's fused AdamW, and
torch.compile over the whole model and its loss unless asked otherwise. The batches are ours.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from megaphi.allocator import keep_freed_memory
from megaphi.config import Recipe
from megaphi.data.loader import MicroBatch, read_samples, to_micro_batch
from megaphi.data.samples import train_dataset
from megaphi.device import StepTimer, is_gpu
from megaphi.formats.hf_config import config_to_hugging_face
from megaphi.recipe_file import load_recipe
from tools.bench.train.measure import measure


def build(recipe: Recipe, device: torch.device) -> torch.nn.Module:
    """Their model on the device, in fp32."""
    import transformers

    values = config_to_hugging_face(recipe.model, torch.float32, None)
    values |= {
        "attention_dropout": recipe.model.attention_dropout,
        "resid_pdrop": recipe.model.residual_dropout,
        "use_cache": False,
    }
    for key in ("architectures", "model_type", "dtype", "torch_dtype"):
        values.pop(key)
    config = transformers.PhiConfig(**values | {"attn_implementation": "sdpa"})
    torch.manual_seed(recipe.train.seed)
    with torch.device(device):
        model = transformers.PhiForCausalLM(config)
    built: torch.nn.Module = model.train()
    return built


def measure_transformers(request: dict[str, Any]) -> dict[str, Any]:
    """Time its steps on the batches of a recipe."""
    recipe = load_recipe(request["options"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not is_gpu(device):
        keep_freed_memory()  # as our own trainings do
    model = build(recipe, device)
    parameters = list(model.parameters())

    def mean_loss(tokens_bt: torch.Tensor, labels_bt: torch.Tensor) -> torch.Tensor:
        logits = model(tokens_bt).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels_bt.flatten())

    if request["peer"] == "transformers":
        mean_loss = torch.compile(mean_loss)
    settings = recipe.optimizer
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    bf16 = recipe.precision.dtype not in ("fp32", "auto")
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    data = train_dataset(recipe, 0)
    timer = StepTimer(device)
    first = 0

    def next_batch() -> MicroBatch:
        nonlocal first
        size = recipe.train.micro_batch_size
        samples = read_samples(data, first, size, recipe.model.vocab_size)
        first += size
        return to_micro_batch(samples, first - size, device)

    def step() -> Callable[[], float]:
        timer.start()
        total = torch.zeros((), device=device)
        count = recipe.micro_batches(1)
        for _ in range(count):
            batch = next_batch()
            with autocast:
                loss = mean_loss(batch.tokens_bt, batch.labels_bt) / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        timer.stop()
        return lambda: float(total)

    result = measure(step, request, device, timer.seconds)
    result["formats"] = "bf16 autocast" if bf16 else "fp32"
    return result
