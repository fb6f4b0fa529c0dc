"""A fastai vision learner, served without fastai."""

__version__ = "1.0.0"
