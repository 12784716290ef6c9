#!/usr/bin/env bash
# The evaluations of docs/evaluation.md, into the folder given (default: results). Goes on where it was interrupted.
# Needs `pip install ".[evaluate,text,captum]"` and ../shared with its models and data; about an hour on two cores.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-results}
shared=$(cd ../shared && pwd)
export PYTHONPATH="$shared/models${PYTHONPATH:+:$PYTHONPATH}"

images=(transformer_attribution gradient_attention relevance_rollout rollout raw_attention attention_gradcam
  partial_lrp lrp lrp_pixels attnlrp input_x_gradient input_x_gradient_pixels)
texts=(transformer_attribution gradient_attention relevance_rollout rollout raw_attention attention_gradcam
  partial_lrp lrp attnlrp input_x_gradient)
rules=(--rules positive official)

fastrel evaluate --data "coco:$shared/data/coco_masks" --model real_models:clip_imagenet \
  --methods "${images[@]}" "${rules[@]}" --metric pointing segmentation --limit 24 --out "$out/coco"
fastrel evaluate --data "sst:$shared/data/sst/trees_dev.txt.gz" --model real_models:minilm_sst2 \
  --methods "${texts[@]}" "${rules[@]}" --normalize --metric rationale --limit 80 --out "$out/sst"
fastrel evaluate --data mosaics --methods "${images[@]}" "${rules[@]}" \
  --metric pointing segmentation perturbation perturbation-mean --limit 30 --out "$out/mosaics"
fastrel evaluate --data "images:$shared/data/imagenet_1_per_class" --model real_models:clip_imagenet \
  --methods "${images[@]}" --metric perturbation --limit 4 --out "$out/imagenet"
fastrel evaluate --data "eraser:$shared/data/eraser_movies/val.jsonl.gz" --model real_models:minilm_sst2 \
  --methods "${texts[@]}" "${rules[@]}" --normalize --metric rationale faithfulness --limit 8 --out "$out/movies"
fastrel evaluate --data mosaics --methods transformer_attribution attention_flow integrated_gradients \
  --metric pointing segmentation perturbation --limit 5 --out "$out/mosaics-slow"
fastrel evaluate --data "coco:$shared/data/coco_masks" --model real_models:clip_imagenet \
  --methods transformer_attribution integrated_gradients --metric pointing segmentation --limit 2 --out "$out/coco-slow"
