#!/usr/bin/env bash
# The evaluations of docs/evaluation.md, into the folder given (default: results). Goes on where it was interrupted.
# Needs `pip install ".[evaluate,text,captum]"` and ../shared with its models and data. Hours on one core: COCO with all methods half an
# hour or more, SST and mosaics ten minutes each, scripts/sanity.py five, perturbation of CLIP half an hour for each method and metric,
# whose scores so far are in docs/scores.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-results}
mkdir -p "$out"
for scores in docs/scores/*.csv.gz; do
  folder=$out/$(basename "$scores" .csv.gz)
  [ -e "$folder/scores.csv" ] || { mkdir -p "$folder" && gunzip -c "$scores" > "$folder/scores.csv"; }
done
shared=$(cd ../shared && pwd)
export PYTHONPATH="$shared/models${PYTHONPATH:+:$PYTHONPATH}"

both=(frozen_attribution transformer_attribution relevance_per_attention gradient_attention relevance_rollout rollout raw_attention attention_gradcam
  alti legrad attention_guided_cam attcat partial_lrp lrp attnlrp input_x_gradient)
images=("${both[@]}" lrp_pixels input_x_gradient_pixels)
fast=(frozen_attribution transformer_attribution relevance_per_attention gradient_attention raw_attention rollout attention_gradcam legrad attention_guided_cam
  attcat partial_lrp attnlrp input_x_gradient)
rules=(--rules positive official)
coco=(--data "coco:$shared/data/coco_masks" --model real_models:clip_imagenet --metric pointing segmentation)
sst=(--data "sst:$shared/data/sst/trees_dev.txt.gz" --model real_models:minilm_sst2 --normalize)
movies=(--data "eraser:$shared/data/eraser_movies/val.jsonl.gz" --model real_models:minilm_sst2 --normalize)
clip=(--data "images:$shared/data/imagenet_1_per_class" --model real_models:clip_imagenet)
mosaics=(--data mosaics --batch-size 10)

python -m studies.readings clip --half both --readings default "frozen gradient, per attention received" "per attention received" \
  "frozen gradient" "last block" "gradient attention" "gradient (LeGrad)" >"$out/coco-readings.md"
fastrel evaluate "${coco[@]}" --methods "${fast[@]}" --out "$out/coco"
fastrel evaluate "${coco[@]}" --methods transformer_attribution partial_lrp lrp lrp_pixels "${rules[@]}" --out "$out/coco-rules"
fastrel evaluate "${mosaics[@]}" --methods "${images[@]}" "${rules[@]}" \
  --metric pointing segmentation --limit 300 --out "$out/mosaics"
fastrel evaluate "${mosaics[@]}" --methods frozen_attribution transformer_attribution relevance_per_attention gradient_attention rollout legrad attnlrp \
  --metric perturbation perturbation-mean perturbation-blur insertion road sensitivity --limit 50 --out "$out/mosaics-perturbation"
fastrel evaluate "${clip[@]}" --methods frozen_attribution transformer_attribution relevance_per_attention gradient_attention rollout legrad attnlrp \
  --metric perturbation perturbation-mean perturbation-blur insertion road --limit 100 --batch-size 10 --out "$out/clip-perturbation"
fastrel evaluate "${sst[@]}" --methods "${both[@]}" "${rules[@]}" --metric rationale --limit 500 --batch-size 25 --out "$out/sst"
fastrel evaluate "${movies[@]}" --methods "${both[@]}" "${rules[@]}" --metric rationale --limit 60 --out "$out/movies"
fastrel evaluate "${movies[@]}" --methods "${both[@]}" "${rules[@]}" --metric faithfulness --limit 20 --out "$out/movies-faithfulness"
python scripts/sanity.py "$out/sanity.md"
