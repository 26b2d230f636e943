"""t-SNE of what a student's classifier reads, after some timesteps (Fig. 4 of Yu et al. 2025).

Shapes: T timesteps, B batch, N images, C channels.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from tdkd_dist import distributed
from tdkd_dist.data.loaders import make_val_loader
from tdkd_dist.data.normalise import Normalise, as_input
from tdkd_dist.losses import ensembles
from tdkd_dist.mistakes import Mistake
from tdkd_dist.report.runs import Floats, RunData
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.students.base import SpikingNet
from tdkd_dist.weights import load_student

Labels = NDArray[np.int64]


def embed(run: RunData, num_images: int) -> tuple[dict[int, Floats], Labels]:
    """`[N, 2]` embeddings of the running mean of pooled features after t = 1, T/2 and T, and the labels `[N]`.

    The images are `num_images` of the validation set, evenly spread. Raises `Mistake` if the run's student is no
    spiking network, or its weights or data are not here.
    """
    from sklearn.manifold import TSNE

    features_TNC, labels_N = running_features(run, num_images)
    T = len(features_TNC)
    found = {}
    for t in sorted({1, max(T // 2, 1), T}):
        perplexity = min(30.0, (len(labels_N) - 1) / 3)
        found[t] = TSNE(init="pca", random_state=0, perplexity=perplexity).fit_transform(features_TNC[t - 1].numpy())
    return found, labels_N


def running_features(run: RunData, num_images: int) -> tuple[torch.Tensor, Labels]:
    """`[T, N, C]`: the mean over steps <= t of the features pooled over pixels; and the labels `[N]`."""
    weights = RunFolder(run.folder).student_file
    if not weights.is_file():
        raise Mistake(f"{weights}: not there yet")
    model = load_student(weights)
    if not isinstance(model, SpikingNet):
        raise Mistake(f"{run.config.student.model} has no timesteps")
    data = run.config.data
    loader = make_val_loader(
        data,
        batch_size=50,
        rank=0,
        world_size=max(1, int(run.last["val/samples"]) // num_images),
        device=torch.device("cpu"),
        workers=data.workers or distributed.cores_per_rank(),
    )
    normalise = Normalise(model.default_cfg["mean"], model.default_cfg["std"])
    model.set_num_timesteps(run.config.eval_timesteps)
    pooled, labels = [], []
    with torch.no_grad():
        for images_BCHW, labels_B in loader:
            x = as_input(normalise(images_BCHW), model.num_timesteps)
            pooled.append(model.forward_features(x).mean((3, 4)))
            labels.append(labels_B.clone())
    loader.close()
    return ensembles(torch.cat(pooled, dim=1)), torch.cat(labels).numpy()
