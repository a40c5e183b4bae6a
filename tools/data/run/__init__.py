"""`megaphi data run`: complete corpora from one recipe, resumable, with estimates."""
