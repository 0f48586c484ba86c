"""One file a word: its kernels, as ``kernels_under_test`` collects them."""
