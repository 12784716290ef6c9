"""An explanation as a file: model, forward and reverse pass as one program of plain operators that needs nothing but torch.

`fastrel.export(explainer, images, path="explain.pt2")` writes it, `fastrel.load("explain.pt2")` reads it.
"""
