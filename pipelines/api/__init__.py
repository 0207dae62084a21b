"""The functions of `import restoray`; the commands call the same ones."""
