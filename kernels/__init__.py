"""Everything that touches weights: FP8 block quantise, digest, pack and scatter. A pure reference beside each kernel."""
