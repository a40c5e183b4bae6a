"""`megaphi plan RECIPE --gpu NAME --gpus N`: memory, speed, time and cost before anything is paid.

Shows the recipe's own layout and the fastest ones found that fit, each with its memory on the
fullest GPU and a predicted step time. Predictions rest on assumptions (`--assumptions`); they are
compared with the training figures of docs/benchmarks where that GPU has been measured.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.planning.devices import DEVICES, Device, find_device
from tools.planning.layout import (
    Job,
    Layout,
    PipelineSchedule,
    Recompute,
    problems,
    search,
)

if TYPE_CHECKING:
    from megaphi.config import Recipe

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "docs" / "benchmarks"
"""Where the reports of `megaphi bench train` are kept."""


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit status, 0 whether or not the recipe fits.

    Raises:
        ValueError: the call or the recipe is wrong.
        FileNotFoundError: there is no such recipe.
    """
    parser = argparse.ArgumentParser(
        prog="megaphi plan",
        usage="megaphi plan RECIPE [--section.key=value ...] --gpu NAME --gpus N [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file (YAML)")
    parser.add_argument("--gpu", required=True, metavar="NAME", help=", ".join(DEVICES))
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="GPUs in all")
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="joined by NVLink; default: 8"
    )
    parser.add_argument(
        "--kernels",
        choices=("triton", "torch"),
        default="triton",
        help="as MEGAPHI_KERNELS chooses at run time; default: triton",
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="layouts; default: 5")
    parser.add_argument("--assumptions", action="store_true", help="print them, with sources")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, overrides = parser.parse_known_args(list(argv))
    for name in ("gpus", "gpus_per_node", "top"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be positive")
    device = find_device(options.gpu)

    from megaphi.recipe_file import load_recipe
    from tools.planning.report import render

    recipe = load_recipe([options.recipe, *overrides])
    report = plan(recipe, device, options.gpus, options.gpus_per_node, options.kernels, options.top)
    if options.assumptions:
        report["assumptions"] = _assumptions(device)
    print(json.dumps(report) if options.json else render(report))
    return 0


def plan(
    recipe: "Recipe",
    device: Device,
    gpus: int,
    gpus_per_node: int = 8,
    kernels: str = "triton",
    top: int = 5,
) -> dict[str, Any]:
    """Everything that is reported, as plain values.

    Raises:
        ValueError: the recipe's layout does not divide the GPUs, or computes in fp32.
    """
    from megaphi.model.phi import num_parameters

    job = job_of(recipe, kernels)
    own_layout = recipe_layout(recipe, gpus)
    own = describe(job, own_layout, device, gpus_per_node)
    best = best_layouts(job, device, gpus, gpus_per_node, top)
    report = {
        "recipe": {
            "parameters": num_parameters(job.model),
            "tokens_per_step": job.tokens_per_step,
            "steps": job.steps,
            "tokens": job.tokens_per_step * job.steps,
            "precision": recipe.precision.dtype,
        },
        "gpu": device.name,
        "gpu_memory_gib": device.memory_gib,
        "gpus": gpus,
        "gpus_per_node": gpus_per_node,
        "kernels": kernels,
        "own": own,
        "best": best,
        "measured": measured(device),
    }
    report["warnings"] = warnings(recipe, job, own_layout, device, report)
    return report


def job_of(recipe: "Recipe", kernels: str) -> Job:
    """The training that a recipe describes.

    Raises:
        ValueError: it computes in fp32, whose speed no table here knows.
    """
    if recipe.precision.dtype == "fp32":
        raise ValueError(
            "precision.dtype=fp32 is not planned, only 16-bit compute: use --precision.dtype=bf16"
        )
    return Job(
        model=recipe.model,
        sequence_length=recipe.data.sequence_length,
        global_batch_size=recipe.train.global_batch_size,
        steps=recipe.train.steps,
        kernels="torch" if kernels == "torch" else "triton",
    )


def recipe_layout(recipe: "Recipe", gpus: int) -> Layout:
    """The layout that a recipe asks for on so many GPUs.

    Raises:
        ValueError: the GPUs are not a multiple of pipeline x context x tensor.
    """
    parallel = recipe.parallel
    model_size = parallel.pipeline * parallel.context * parallel.tensor
    if gpus % model_size:
        raise ValueError(
            f"--gpus {gpus} is not a multiple of parallel.pipeline x context x tensor, {model_size}"
        )
    schedule = PipelineSchedule(parallel.pipeline_schedule)
    if parallel.pipeline == 1:
        schedule = PipelineSchedule.ONE_F_ONE_B
    return Layout(
        pipeline=parallel.pipeline,
        data=gpus // model_size,
        context=parallel.context,
        tensor=parallel.tensor,
        micro_batch_size=recipe.train.micro_batch_size,
        reshard_after_forward=parallel.reshard_after_forward,
        recompute=Recompute(parallel.recompute),
        schedule=schedule,
        chunks=1
        if schedule is PipelineSchedule.ONE_F_ONE_B
        else parallel.pipeline_stages_per_process,
    )


def runs_today(layout: Layout) -> bool:
    """Whether the configuration of this version accepts a layout."""
    from megaphi.config import Parallel

    values: dict[str, Any] = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "pipeline_schedule": layout.schedule.value,
        "pipeline_stages_per_process": max(2, layout.chunks),
        "context": layout.context,
        "reshard_after_forward": layout.reshard_after_forward,
        "recompute": layout.recompute.value,
    }
    try:
        Parallel(**values)
    except ValueError:
        return False
    return True


def describe(job: Job, layout: Layout, device: Device, gpus_per_node: int) -> dict[str, Any]:
    """A layout with its memory, time and cost; without them where it breaks a rule."""
    from tools.planning.memory import GIB, memory_plan
    from tools.planning.timing import calibration, mfu, step_time

    found = problems(job, layout, gpus_per_node)
    report: dict[str, Any] = {
        "layout": dataclasses.asdict(layout),
        "runs_today": runs_today(layout),
        "problems": found,
        "fits": False,
    }
    if found:
        return report
    memory = memory_plan(job, layout)
    time = step_time(job, layout, device, gpus_per_node)
    seconds, factor = time.total, calibration(device)
    rate = job.tokens_per_step / seconds
    days = job.steps * seconds / 86400
    return report | {
        "fits": memory.total <= device.memory_gib * GIB,
        "micro_batches": layout.micro_batches(job),
        "memory_gib": memory.total / GIB,
        "memory_kinds_gib": {name: size / GIB for name, size in memory.kinds.items()},
        "update_gib": memory.update / GIB,
        "fullest_stage": memory.stage,
        "step_seconds": seconds,
        "step_kinds_seconds": time.kinds,
        "tokens_per_second": rate,
        "tokens_per_second_per_gpu": rate / layout.gpus,
        "mfu": mfu(job, layout, device, seconds),
        "days": days,
        "gpu_hours": days * 24 * layout.gpus,
        # the same with the shortfall of published runs
        "calibration": factor,
        "tokens_per_second_per_gpu_calibrated": rate / layout.gpus * factor,
        "mfu_calibrated": mfu(job, layout, device, seconds / factor),
        "days_calibrated": days / factor,
        "gpu_hours_calibrated": days * 24 * layout.gpus / factor,
    }


def best_layouts(
    job: Job, device: Device, gpus: int, gpus_per_node: int, top: int
) -> list[dict[str, Any]]:
    """The fastest layouts that fit, one for each mesh; one that runs today is among them."""
    from tools.planning.memory import GIB, memory_plan
    from tools.planning.timing import step_time

    by_mesh: dict[tuple[int, int, int, bool], tuple[float, Layout]] = {}
    for layout in search(job, gpus, gpus_per_node):
        seconds = step_time(job, layout, device, gpus_per_node).total
        today = runs_today(layout)
        mesh = (layout.pipeline, layout.context, layout.tensor, today)
        if mesh in by_mesh and by_mesh[mesh][0] <= seconds:
            continue
        if memory_plan(job, layout).total <= device.memory_gib * GIB:
            by_mesh[mesh] = seconds, layout
    ranked = []
    for mesh, found in sorted(by_mesh.items(), key=lambda item: item[1][0]):
        # what is not built must be faster than what runs today on the same mesh
        rival = by_mesh.get((*mesh[:3], True))
        if mesh[3] or rival is None or found[0] < rival[0]:
            ranked.append((mesh, found))
    chosen = ranked[:top]
    if not any(mesh[-1] for mesh, _ in chosen):
        chosen += [item for item in ranked if item[0][-1]][:1]
    return [describe(job, layout, device, gpus_per_node) for _, (_, layout) in chosen]


def warnings(
    recipe: "Recipe", job: Job, layout: Layout, device: Device, report: dict[str, Any]
) -> list[str]:
    """What will not work, what is not certain, and what to change."""
    from tools.planning.timing import HOST_SECONDS_PER_BLOCK

    own, found = report["own"], []
    if own["problems"]:
        found.append(f"the recipe's layout cannot be planned: {'; '.join(own['problems'])}")
    elif not own["fits"]:
        found.append(
            f"the recipe's layout needs {own['memory_gib']:.1f} GiB of {device.memory_gib:.1f} on "
            f"the fullest GPU; {_changes(job, layout, device, report['gpus_per_node'])}"
        )
    elif own["memory_gib"] > 0.95 * device.memory_gib:
        found.append(
            f"the recipe's layout leaves {device.memory_gib - own['memory_gib']:.1f} GiB free, "
            "less than the estimates of memory are good for"
        )
    if not own["problems"]:
        kinds = own["step_kinds_seconds"]
        computing = kinds["gemm"] + kinds["attention"] + kinds["elementwise"]
        block = computing / (own["micro_batches"] * layout.stage_layers(job))
        if block < HOST_SECONDS_PER_BLOCK:
            found.append(
                f"a block computes for {1000 * block:.2f} ms, faster than a host launches it "
                f"(about {1000 * HOST_SECONDS_PER_BLOCK:.1f} ms): expect less speed, or take a "
                "larger train.micro_batch_size"
            )
    if not report["best"]:
        found.append(
            f"no layout of this recipe fits on {report['gpus']} x {device.name}: take more or "
            "larger GPUs"
        )
    if recipe.precision.dtype.startswith("fp8"):
        text = "is planned as bf16: faster, and its 8-bit copies of weights need more memory"
        if not device.has_fp8:
            text = f"needs another GPU, {device.name} multiplies no 8-bit floats; planned as bf16"
        found.append(f"precision.dtype={recipe.precision.dtype} {text}")
    if recipe.compute.attention == "plain":
        found.append("compute.attention=plain is planned as a fused kernel: slower, more memory")
    return found


def _changes(job: Job, layout: Layout, device: Device, gpus_per_node: int) -> str:
    """Single changes that make a layout fit, as keys of the recipe."""
    from tools.planning.memory import GIB, memory_plan

    candidates: list[tuple[str, dict[str, Any]]] = []
    size = layout.micro_batch_size
    while size > 1:
        size //= 2
        candidates.append((f"train.micro_batch_size={size}", {"micro_batch_size": size}))
    candidates += [
        (f"parallel.recompute={kind}", {"recompute": kind})
        for kind in (Recompute.SELECTIVE, Recompute.FULL)
    ]
    candidates.append(("parallel.reshard_after_forward=true", {"reshard_after_forward": True}))
    candidates += [
        (f"parallel.tensor={tensor}", {"tensor": tensor, "data": layout.data // factor})
        for factor in (2, 4, 8)
        if layout.data % factor == 0 and (tensor := layout.tensor * factor)
    ]
    fitting: dict[str, str] = {}
    for text, values in candidates:
        changed = dataclasses.replace(layout, **values)
        key = text.split("=")[0]
        if changed == layout or key in fitting or problems(job, changed, gpus_per_node):
            continue
        total = memory_plan(job, changed).total / GIB
        if total <= device.memory_gib:
            later = "" if runs_today(changed) else ", not built yet"
            fitting[key] = f"{text} ({total:.1f} GiB{later})"
    if not fitting:
        return "no single change makes it fit, see the layouts below"
    return f"any one of these makes it fit: {', '.join(fitting.values())}"


def measured(device: Device) -> list[dict[str, Any]]:
    """Rows of `megaphi bench train` on a device, each with what is predicted for it."""
    from megaphi.config import Model
    from tools.planning.memory import GIB, memory_plan
    from tools.planning.timing import step_time

    rows = []
    for path in sorted(BENCHMARKS.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        gpus = report["machine"].get("gpus") or []
        if "recipe" not in report or not gpus or report["settings"]["curve"]:
            continue
        if not all(mark in gpus[0]["name"] for mark in device.marks):
            continue
        for row in report["rows"]:
            chosen = row["configuration"]
            size = chosen["micro_batch"]
            if "problem" in row or chosen["peer"] or chosen["precision"] not in ("bf16", "fp16"):
                continue
            drops = dict.fromkeys(("residual_dropout", "attention_dropout"), chosen["dropout"])
            job = Job(
                model=dataclasses.replace(Model(**report["recipe"]["model"]), **drops),
                sequence_length=report["recipe"]["data"]["sequence_length"],
                global_batch_size=size * report["settings"]["accumulate"],
                kernels=chosen["kernels"],
            )
            layout = Layout(micro_batch_size=size)
            memory = memory_plan(job, layout)
            rows.append(
                {
                    "file": path.name,
                    "name": f"{row['name']}, micro-batch {size}, dropout {chosen['dropout']:g}",
                    "tokens_per_second": row["tokens_per_second"],
                    "predicted": job.tokens_per_step / step_time(job, layout, device).total,
                    "peak_memory_gib": row["peak_memory_gib"],
                    # PyTorch's allocator does not see the reserve
                    "predicted_memory_gib": (memory.total - memory.reserve) / GIB,
                }
            )
    return rows


def _assumptions(device: Device) -> list[dict[str, str]]:
    """The assumptions as a list of objects."""
    from tools.planning.timing import assumptions

    return [
        {"name": name, "value": value, "source": source}
        for name, value, source in assumptions(device)
    ]
