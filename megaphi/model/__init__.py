"""The phi model: blocks, attention, rotary embedding, initialisation and loss."""
