"""The phi model: blocks, attention, rotary embedding, initialisation and loss.

Imports `kernels` for its operations and `parallel` for its layers. Begin with `phi.py`.
"""

from megaphi.own_packages import check_ours

check_ours("kernels")
