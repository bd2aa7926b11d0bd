"""jaxtyping's annotations of shapes. Nothing checks them at run time, so that the models run on
machines without it: there a shape says `Array` and no more."""

try:
    from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8
except ModuleNotFoundError:
    from jax import Array

    class _Shaped:
        def __class_getitem__(cls, _):
            return Array

    Bool = Float = Int = Shaped = UInt8 = _Shaped

__all__ = ["Array", "Bool", "Float", "Int", "Shaped", "UInt8"]
