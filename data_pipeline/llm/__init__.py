"""Stages that ask a language model: `annotate` judges documents, `generate` writes them."""
