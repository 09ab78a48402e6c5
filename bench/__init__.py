"""Comparisons with eager torch and torch.compile on the real layer shapes; ``python -m espkernels bench`` runs them."""
