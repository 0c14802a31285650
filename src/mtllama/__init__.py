"""mtllama: multi-task instruction tuning for LLaMA-family models, end to end."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtllama.api import Model

__version__ = "0.1.0"


def load_model(
    model: str | None = None, *, base: str | None = None, delta: str | None = None, dtype: str = "auto", format: str | None = None
) -> "Model":
    """Load a model, ready to score and generate: a name, a folder or a hub id; or `base` with `delta`, restored while loading.

    `dtype`: auto, float32 or bfloat16; `format`: name of a prompt format, else the model's own, or its chat template's, as in chat and
    serving. (`mtllama eval` asks a base in the format of the training.) Raises `mtllama.errors.UserError`.
    """
    from typing import get_args

    from mtllama.api import Model
    from mtllama.errors import UserError
    from mtllama.model import load
    from mtllama.model.engine import Engine
    from mtllama.model.find import Dtype, find_model

    if dtype not in get_args(Dtype):
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(get_args(Dtype))}")
    source = find_model(model, base, delta)
    return Model(Engine(load.load_model(source, dtype=dtype, format=format or source.spoken_format())))  # type: ignore[arg-type]
