"""`restoray analyze`: studies of models, their rows, plots and reports."""
