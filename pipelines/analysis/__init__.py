"""The parts of `restoray analyze`: what is measured of each picture, how it is kept, drawn and told."""
