"""Train spiking neural networks by temporal-wise logit distillation. Importing it registers the students with timm."""

from tdkd_dist import students as students
