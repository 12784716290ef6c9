"""What the harnesses of other libraries call, ten lines each: one module per library, imported by its name.

- `fastrel.adapters.captum.Relevance`: captum's `Attribution`.
- `fastrel.adapters.quantus.Explain`: a Quantus `explain_func`.
- `fastrel.adapters.cam.RelevanceCAM`: pytorch-grad-cam's call.
- `fastrel.adapters.pipeline.Pipeline`: a call in the manner of Hugging Face's pipelines.
- `fastrel.adapters.virelay`: the HDF5 files of ViRelAy and CoRelAy.
"""
