"""Corpus stages as pure functions over records, and the engines that run them."""
