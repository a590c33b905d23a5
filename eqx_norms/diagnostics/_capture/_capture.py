"""Look at what submodules return, and at the loss's derivatives there; put something else there."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from ..._processes import jit, spans_processes
from ._functions import Function, as_functions, placed
from ._instrument import Observer, Where
from ._interpret import ArrayType, Edit, Marked, evaluate, marked_types
from ._library import as_model, observe
from ._model import Model
from ._names import as_names
from ._plan import Output, make_plan
from ._replace import Replace, check_called, path_of, replacement
from ._tag import Inputs


def capture(
    fn: Callable[..., Any],
    model: PyTree,
    *args: Any,
    where: Where = (),
    names: str | Collection[str] = (),
    inputs: bool = False,
    replace: Replace | None = None,
    functions: str | Collection[str] = (),
) -> tuple[Any, dict[str, PyTree]]:
    """Evaluates `fn(model, *args)` and hands out what the submodules of `model` returned.

    `fn` is traced, as by `jax.jit`. Meanwhile, and in this thread only, the matched submodules mark
    their outputs. What was marked is collected as the traced program runs. So it works under any
    transformation that `fn` applies, and `capture` may itself run under `jax.jit`, `jax.vmap`,
    `jax.grad` or another `capture`. Python side effects of `fn` happen once, while it is traced.

    The model and the structure of its tree do not change, so `fn` may partition and combine it,
    map over it together with a tree of the same structure, or take a training step.

    !!! example

        ```python
        mlp = eqx.nn.MLP(2, 1, 8, 3, key=key)
        out, values = capture(lambda m, x: jax.vmap(m)(x), mlp, x, where=eqx.nn.Linear)
        values["layers[0]"]  # of shape (batch, 8)

        # The same network with one layer silenced, and with its outputs for other inputs.
        silent = {"layers[0]": jnp.zeros_like}
        out, _ = capture(lambda m, x: jax.vmap(m)(x), mlp, x, where=(), replace=silent)
        out, _ = capture(lambda m, x: jax.vmap(m)(x), mlp, x[::-1], where=(), replace=values)
        ```

    **Arguments:**

    - `fn`: a function of the model and `args`. It may return anything.
    - `model`: any pytree with `equinox.Module`s in it, or with modules of `flax.nnx`. Of
        `flax.linen` and Haiku it is the parameters that `fn` gives to `apply`, or all variables.
    - `args`: anything; arrays are traced.
    - `where`: which submodules to capture. It is a type, a tuple of types, or a function of
        `(path, module)`, or of the module alone such as [`eqx_norms.is_norm`][], that says whether
        to capture it. It is asked about every module that can be called, including the model
        itself, whose path is `""`. `()` captures only what is replaced.
    - `names`: values that `fn` or the model names itself, by
        `jax.ad_checkpoint.checkpoint_name(value, "scores")`: one name, or several. Each has an
        entry below, by its name. Further values of the same name, and the further arrays of a
        pytree that is named, have `#1`, `#2` and so on. `replace` takes them too.
    - `inputs`: whether to capture as well what each matched submodule was given. Its entry is
        `layers[0]:in`, and `layers[0]:in#1` of the second call. That is the array among the
        arguments, or a tuple of several. Integers that `fn` closes over are left out. `replace`
        takes these entries too.
    - `functions`: functions in between whose results are captured too, such as `"relu"`, `"gelu"`
        or `"softmax"`: one of those that [`eqx_norms.diagnostics.diagnose`][] knows, or several.
        They are those of `jax.nn`, and what is written as they are, as `jnp.maximum(x, 0)`. The key
        is that of the submodule whose output goes in, and the name: `layers[0]:relu`; or, as of a
        softmax in attention, of the submodule around it: `attention:softmax`. `replace` takes them
        too. Axes of `jax.vmap` are where the program has them, mostly in front.
    - `replace`: what `fn` uses in place of the output of a submodule, by the key that the value has
        below. Each call has its own key. The replacement is either a value of the same structure,
        shapes and dtypes as the value below, or a function of what the submodule returned,
        `fn(value)`. The value has the axes of `jax.vmap` in front, as below. In a `jax.lax.scan` or
        `jax.lax.map` the function is called with the value of one step and with the number of that
        step. It gets one number for each loop around, the outermost first:
        `lambda value, step: jnp.where(step == 2, 0 * value, value)`.

    **Returns:**

    A pair of what `fn(model, *args)` returns, and of a dictionary with one entry for each call of
    a matched submodule, in the order of the calls (`jax.jit` sorts the dictionaries it returns).

    The key is the path of the submodule, such as `layers[0].norm` or `blocks['a']`. Further calls
    of the same submodule have `#1`, `#2` and so on at the end. An object that stands at two paths
    has the path through which it is called. In an `equinox.nn.Shared` a layer that is shared whole
    has the path from which it is taken, and one that shares an array has its own. A submodule that
    is never called has no entry, nor has a module that `fn` makes.

    A submodule that `fn` has built anew, as `jax.jit` and `equinox.combine` do, has the path of
    the arrays that it holds, or of those that they were computed from. Frozen ones, which
    `equinox.partition` has taken out of the model, must be in one of `args`, as it returned them.
    A submodule that holds no array, such as an `equinox.nn.Lambda`, is found through the module in
    whose call it is called, or else as the only one in the model that is equal to it.

    Of `flax.nnx`, `fn` gets a copy of the model, and what it updates in there is lost with it. A
    module has the path that `nnx.iter_modules` gives it. Of `flax.linen` and Haiku the path is the
    name of the module, `Block_0.Dense_0`. If `fn` applies several modules, or if the parameters
    stand deeper in `model`, their place is ahead of it: `encoder.Block_0.Dense_0`.

    The value is what its `__call__` returned: an array of the dtype that the model computes in, or
    any pytree of these. Of a stateful layer, which returns `(output, state)`, it is the output.
    Axes come in this order:

    1. one for each `jax.lax.scan` or `jax.lax.map` around the call, the outermost first;
    2. one for each `jax.vmap` around it, the outermost first, whatever `in_axes` and `out_axes`
        are;
    3. those that the submodule returned.

    An output that does not depend on what is mapped has no axis for it. Nor has one that is the
    same in every step of a loop, if `fn` itself differentiates the loop. To have the axis of the
    batch before the axis of time, put the `jax.vmap` around `capture`, not inside `fn`.

    What is replaced is captured as well, with the value that `fn` uses.

    In a `jax.lax.cond` or `switch`, what the branch not taken would have returned is NaN. It is
    zero for integers, and if `jax_debug_nans` is set, which would stop at a NaN. Under `jax.vmap`
    with a mapped predicate, JAX computes all branches for all examples, and these values are
    captured.

    **Raises:**

    - `ValueError` if `where` matches nothing, or if nothing that it matches is called. Also if one
        of `names` is not given, or is the path of a matched submodule, if `replace` names no call,
        or if a replacement has another structure or shape.
    - `TypeError` if `names` are no strings, if `model` is an `nnx.State`, or a module of
        `flax.linen` or Haiku itself, if `model` or `args` hold a `jax.ShapeDtypeStruct`, or if a
        replacement is of another dtype.
    - `NotImplementedError`, naming the submodule and the place, if it is called where no value can
        be handed out. That is in a while loop, in a function with a custom derivative rule, in
        `jax.shard_map`, and in any other primitive that this function does not know.
    - `NotImplementedError` if it cannot be told which submodule is called, because it has no arrays
        and several equals, or because `fn` has stacked several into one. To scan over layers, stack
        them before (`equinox.filter_vmap` over their keys), not in `fn`.
    - `NotImplementedError` if `fn` itself differentiates what is replaced. Differentiate `capture`,
        or use [`eqx_norms.diagnostics.capture_grads`][].
    """
    asked = as_names(names), inputs, as_functions(functions)
    program = _Program(fn, as_model(model), args, where, replace, *asked)
    run = lambda tree, args: program.run(tree, args, program.no_shifts())
    out, marked = _by_all_processes(run, program.model.tree, args)
    return out, program.by_path(marked)


def capture_grads(
    loss_fn: Callable[..., Float[Array, ""]],
    model: PyTree,
    *args: Any,
    where: Where = (),
    names: str | Collection[str] = (),
    inputs: bool = False,
    replace: Replace | None = None,
    functions: str | Collection[str] = (),
) -> tuple[Float[Array, ""], dict[str, PyTree], dict[str, PyTree], PyTree]:
    """Differentiates `loss_fn(model, *args)` with respect to the model and to what its submodules
    returned.

    It runs one forward and one backward pass. Zero is added to each output of a matched submodule,
    and the loss is differentiated with respect to these zeros and the model together. Custom
    derivative rules stay in force.

    Each call traces `loss_fn` anew. If you call it often, put it under `equinox.filter_jit`.

    **Arguments:**

    - `loss_fn`: a function of the model and `args` that returns a floating-point scalar.
    - `model`, `args`, `where`, `names`, `inputs`, `replace`, `functions`: as for
        [`eqx_norms.diagnostics.capture`][].

    **Returns:**

    A 4-tuple of

    - the loss;
    - the values, as [`eqx_norms.diagnostics.capture`][] returns them;
    - the derivatives of the loss with respect to the values, under the same keys, each of the
        structure, shapes and dtypes of its value. Integers have `None`, and what the loss does not
        depend on has zero. A value that is shared by several examples, steps or shards has the
        sum. If a value is replaced, it is the derivative with respect to the replacement;
    - the derivatives with respect to the model, as `equinox.filter_grad` gives them; as
        `nnx.grad` for `flax.nnx`; of all variables of `flax.linen` those of `params`.

    **Raises:**

    The errors of [`eqx_norms.diagnostics.capture`][], and

    - `TypeError` if `loss_fn` does not return a floating-point scalar.
    - `NotImplementedError` if `loss_fn` itself differentiates a `jax.checkpoint` in which a
        matched submodule is called. It is computed anew in there, out of reach of the added zero.
    """
    asked = as_names(names), inputs, as_functions(functions)
    program = _Program(loss_fn, as_model(model), args, where, replace, *asked)
    backward = _by_all_processes(program.backward, program.model.tree, args)
    loss, marked, grads, model_grads = backward
    model_grads = program.model.gradients(model_grads)
    return loss, program.by_path(marked), program.by_path(grads), model_grads


class _Program:
    """`fn(model, *args)` as a jaxpr in which the outputs of the matched submodules are tagged."""

    def __init__(
        self,
        fn: Callable,
        model: Model,
        args: tuple,
        where: Where,
        replace: Replace | None,
        names: tuple[str, ...] = (),
        inputs: bool = False,
        functions: Collection[str] = (),
    ):
        replace = {} if replace is None else replace
        if not isinstance(replace, Mapping):
            raise TypeError(
                "`replace` must map calls to what they are to return, or to functions of what they "
                f"return, but it is {replace!r}. Type for instance "
                "`replace={'layers[0]': jnp.zeros_like}`."
            )
        self.model = model
        paths = {path_of(key) for key in replace}
        also = {each for each in paths - {*names} if each.rpartition(":")[2] not in functions}
        watch = observe(model, where, also, names, inputs, functions=functions)
        _check_arrays(model.tree, args)
        jaxpr, self.out, self.static_out = watch.trace(fn, args)
        plan = make_plan(jaxpr, args, watch)
        places = placed(plan.outputs, marked_types(plan)) if functions else []
        self.plan = plan.only_wanted() if functions else plan
        _check_named(watch)
        if not self.plan.outputs:
            raise ValueError(
                "`fn` must call at least one submodule that `where` matches, but it calls none, or "
                "only in a derivative or in a solver that hides it. It is given a copy of the "
                "model: type `lambda model, x: model(x)`, not a function that holds the model "
                "itself."
            )
        self.types = marked_types(self.plan)
        self.keys = _keys(self.plan.outputs, places)
        check_called(replace, self.keys)
        triples = zip(self.keys, self.plan.outputs, self.types, strict=True)
        self.replacements = {
            number: replacement(key, output.call, types, replace[key])
            for number, (key, output, types) in enumerate(triples)
            if key in replace
        }

    def run(self, tree: PyTree, args: tuple, shifts: Marked) -> tuple[Any, Marked]:
        arrays = jtu.tree_leaves(eqx.filter((tree, args), eqx.is_array))
        edits = [Edit(shift, self.replacements.get(n)) for n, shift in enumerate(shifts)]
        outs, marked = evaluate(self.plan, arrays, edits)
        out = jtu.tree_unflatten(jtu.tree_structure(self.out), outs)
        return eqx.combine(out, self.static_out), marked

    def backward(
        self, tree: PyTree, args: tuple
    ) -> tuple[Float[Array, ""], Marked, Marked, PyTree]:
        """The loss, what is marked, and the derivatives there and of what is trained."""
        self.check_differentiable()

        @eqx.filter_value_and_grad(has_aux=True)
        def loss(trained_and_shifts):
            trained, shifts = trained_and_shifts
            return self.run(self.model.with_trained(tree, trained), args, shifts)

        trained = self.model.trained(tree)
        (value, marked), (model_grads, grads) = loss((trained, self.zero_shifts()))
        return value, marked, grads, model_grads

    def by_path(self, marked: Marked) -> dict[str, PyTree]:
        triples = zip(self.keys, self.plan.outputs, marked, strict=True)
        return {key: output.call.rebuild(leaves) for key, output, leaves in triples}

    def no_shifts(self) -> Marked:
        return [[None] * len(types) for types in self.types]

    def zero_shifts(self) -> Marked:
        return [[_zero_shift(kind) for kind in types] for types in self.types]

    def check_differentiable(self) -> None:
        shape = getattr(self.out, "shape", None)
        if shape != () or not jnp.issubdtype(self.out.dtype, jnp.floating):
            raise TypeError(
                "`loss_fn` must return one floating-point scalar, but it returns "
                f"{eqx.combine(self.out, self.static_out)}. Type for instance `jnp.mean(loss)`."
            )
        anew = dict.fromkeys(path for output in self.plan.recomputed for path in output.paths)
        if anew:
            raise NotImplementedError(
                f"The derivative at {', '.join(map(repr, anew))} cannot be taken: `loss_fn` "
                "differentiates a `jax.checkpoint` that calls it, which computes it a second time. "
                "Type a `where` that leaves it out, or take the checkpoint away."
            )


def _by_all_processes(run: Callable, model: PyTree, args: tuple) -> Any:
    """`run(model, args)`; of what several processes hold, in one program and not step by step."""
    arrays, static = eqx.partition((model, args), eqx.is_array)
    if not any(map(spans_processes, jtu.tree_leaves(arrays))):
        return run(model, args)
    return jit(lambda arrays: run(*eqx.combine(arrays, static)))(arrays)


def _check_named(watch: Observer) -> None:
    for name in watch.names:
        if name not in watch.named:
            there = ", ".join(map(repr, map(str, watch.named)))
            raise ValueError(
                "`names` must be names that `fn` gives by `jax.ad_checkpoint.checkpoint_name`, but "
                f"it gives none the name {name!r}. "
                + (f"It gives {there}: type one of these." if there else "It names nothing.")
            )


def _keys(outputs: list[Output], functions: list[str]) -> list[str]:
    """`norm`, `norm#1` and so on: of each call, in the order of the calls; `norm:in` goes in.

    `functions` are the paths of those in between.
    """
    calls, keys, of_functions = Counter(), [], iter(functions)
    for output in outputs:
        path = output.paths[0]  # of several, the evaluation will complain
        path += ":in" * isinstance(output.call, Inputs)
        path = next(of_functions) if isinstance(output.call, Function) else path
        keys.append(f"{path}#{calls[path]}" if calls[path] else path)
        calls[path] += 1
    return keys


def _check_arrays(model: PyTree, args: tuple) -> None:
    for leaf in jtu.tree_leaves((model, args)):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"`model` and `args` must hold arrays, but they hold a {leaf}. For the shapes "
                "alone type `equinox.filter_eval_shape(lambda model, x: capture(fn, model, x, "
                "where=where), model, x)`."
            )


def _zero_shift(kind: ArrayType) -> jax.Array | None:
    # -0., for 0. + -0. is 0.: adding this is the identity, down to the sign of zero.
    return kind.full(-0.0) if jnp.issubdtype(kind.dtype, jnp.inexact) else None
