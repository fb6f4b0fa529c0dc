"""A fastai vision learner served without fastai: see README.md."""

__version__ = "1.0.0"
