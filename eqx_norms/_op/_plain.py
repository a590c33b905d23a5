"""Norms for those who read programs, and know the operations of JAX alone."""

from contextlib import AbstractContextManager

import jax

_plain = jax.make_user_context(False)  # JAX traces again what it has traced with another value.


def is_plain() -> bool:
    return _plain.value


def plain() -> AbstractContextManager[None]:
    """A context in which the layers are functions of plain `jax.numpy`.

    Use it for tools that know only the operations of JAX, such as a Pallas kernel of your own,
    `jax.experimental.jet` and `sparsify`, and exporters and interpreters of jaxprs
    ([Export](../export.md) has a list):
    ```python
    from jax.experimental.jet import jet

    with plain():
        y, [dy] = jet(layer_norm, (x,), ([v],))
    ```

    Values are the same. There is no custom derivative, because JAX differentiates the layers like
    any function. There are also none of the primitives that tell a compiler what not to store, so
    the backward keeps 12 bytes an element or more. The context acts on what is traced in it, in
    this thread. `jax.jit` traces anew in it.

    **Returns:**

    A context manager.
    """
    return _plain(True)
