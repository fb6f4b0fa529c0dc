"""A fastai vision learner served without fastai: see README.md."""
