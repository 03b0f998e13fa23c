"""Few-step distillation: `METHODS`, each called as `METHODS[name](options, student=...,
teacher=..., family=..., steps=...)`."""

from fastdistill.distill.methods import METHODS as METHODS
