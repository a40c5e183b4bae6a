"""Files of a model: checkpoint manifests, safetensors, Hugging Face directories, GGUF, model cards.

Imports nothing of the trainer. Begin with `manifest.py` and `weights.py`; the two exports are
`export_hugging_face.py` and `export_gguf.py`.
"""
