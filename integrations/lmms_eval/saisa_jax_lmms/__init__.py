"""saisa_jax as a model of lmms-eval: `lmms-eval --model saisa_jax --model_args checkpoint=DIR --tasks ...`."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(
    "saisa_jax",
    simple_class_path="saisa_jax_lmms.model.SaisaJaxSimple",
    chat_class_path="saisa_jax_lmms.model.SaisaJaxChat",
    aliases=("saisa",),
)
