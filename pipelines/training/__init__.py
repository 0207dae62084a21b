"""One training stage: check the recipe and its inputs, then run the training loop under Ray Train."""
