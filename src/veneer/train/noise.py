"""The gradient noise scale: at which batch more episodes a step stop paying for themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from veneer.measure.noise_scale import noise_parts
from veneer.train.session import Metrics, Session
from veneer.types import Datum, LossName


async def noise_metrics(
    session: Session, data_GD: Sequence[Sequence[Datum]], groups: int, loss: LossName, settings: Mapping[str, float]
) -> Metrics:
    """What a batch says of the noise of its gradient, from the gradient of each of its groups and that of all, at the weights as they are;
    nothing is trained. Costs the batch's training pass twice.

    ``data_GD``: the data of each group with a signal, scaled as for the batch's one step. ``groups``: how many the batch had; those without
    a signal have a gradient of zero. A group and not an episode is what is drawn independently: its members share a baseline.

    ``measure/noise_scale.py`` has the formulas.
    """
    squares = [await _squared_norm(session, data, loss, settings) for data in data_GD]
    return noise_parts(squares, await _squared_norm(session, [datum for data in data_GD for datum in data], loss, settings), groups)


async def _squared_norm(session: Session, data: Sequence[Datum], loss: LossName, settings: Mapping[str, float]) -> float:
    session.engine.forward_backward(session.adapter, data, loss, settings)
    return float(np.square(await session.engine.zero_grad(session.adapter)))
