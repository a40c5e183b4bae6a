"""Options that several stages share: how to run, how to reach a language model."""
