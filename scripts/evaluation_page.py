"""docs/evaluation.md from the results of scripts/evaluation.sh: python scripts/evaluation_page.py [results]."""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

INTRO = """\
# Evaluation

Every method of fastrel on real models and data: CLIP ViT-B/16 (zero-shot over ImageNet's classes), a 6-layer MiniLM fine-tuned
on SST-2, and the small ViT that ships with fastrel. All tables come from one resumable script, `scripts/evaluation.sh`, and this page
from `python scripts/evaluation_page.py`. Single scores stay in the folder of each table. The script also has what takes hours and has not been run at
these sizes (movie reviews, faithfulness, all methods and the published rules on COCO); what was not run is not here.

Intervals are 95 % bootstrap intervals of a mean over pictures or texts. Stars mark paired tests against the default method on the
same ones, after Holm's correction for all tests of the table: without a star, nothing was shown.
"""

#: Folder of results, title, what it is. What was not run is left out.
SECTIONS = [
    (
        "coco",
        "Finding objects: CLIP on COCO masks",
        "All 66 objects in 54 pictures. Segmentation thresholds the map at its mean.",
    ),
    (
        "coco-rules",
        "The published rules: CLIP on COCO masks",
        "The same objects, by the default rules and those of the published code.",
    ),
    ("mosaics", "Finding objects: the shipped model on its mosaics", "300 objects of held-out scenes."),
    (
        "mosaics-perturbation",
        "Perturbation, insertion and deletion: the shipped model",
        "50 objects. Pixels go to black or to the mean colour; deletion and insertion (from a blurred picture) are areas under the probability.",
    ),
    ("sst", "Words: MiniLM on SST", "Human word labels of 500 dev sentences; row-normalised rollout, max over sub-words."),
    ("movies", "Rationales: MiniLM on ERASER movie reviews", "60 reviews, up to 512 tokens."),
    ("movies-faithfulness", "Faithfulness: MiniLM on ERASER movie reviews", "Words taken out or kept alone, 20 reviews."),
]

READINGS = """\
## Finding objects: readings of CLIP's blocks on COCO masks

All 66 objects in 54 pictures: the default, `relevance_per_attention` ("frozen gradient, per attention received"), both of its parts alone, the
last block alone (`start_layer=-1`), `gradient_attention` and `legrad`. Energy above the mean is that of the map minus its mean; p is that of a
paired sign-flip test against the default, corrected by Holm for all tests of the table. By `python -m studies.readings clip --half both`. Half of
these pictures served to choose `relevance_per_attention` ([numerics](numerics.md) has both halves).
"""

SANITY = """\
## Do maps change when weights do?

The shipped model with random weights (normal numbers of the same mean and deviation) from the head down, each column with one more
part replaced: Spearman's rank correlation with the map of the trained model over the patches, mean over 32 mosaics (`attention_flow` 2,
`integrated_gradients` 4) and three draws, and its 95 % interval over mosaics. By `scripts/sanity.py`, after Adebayo et al. (NeurIPS 2018).
"""

CONCLUSION = """\
## What can be said

- **CLIP on COCO**: pointing with the default is 0.54 [0.41, 0.67]. `relevance_per_attention` has the higher mAP (0.750 against 0.712, corrected
  p = 0.001) and more energy above the map's mean (0.511 against 0.439, p < 0.001); its lead in pointing (0.676) is not significant after
  correction. The last block alone has more energy inside than the default (0.386 against 0.326, p < 0.001). LeGrad points as well as the default
  and spreads far wider; gradient ⊙ attention is behind in everything.
- **The shipped mosaics**: **AttnLRP wins** in pointing (0.846 against 0.774, p < 0.05), energy, mAP and mIoU (p < 0.01). `relevance_per_attention` is above the
  default in energy (0.524 against 0.508), pixel accuracy, mAP (0.700 against 0.685) and mIoU, gradient ⊙ attention in mAP and mIoU, the published rules in energy
  and behind in mAP (all p < 0.01). The model is small (6 blocks) and its pictures are synthetic.
- **Perturbation, insertion, deletion** on the shipped model: `relevance_per_attention` and gradient ⊙ attention are level with the default. AttnLRP is better in
  deletion (0.163 against 0.195, p < 0.05) and one of eight perturbation scores, LeGrad worse in insertion (0.733 against 0.770, p < 0.01), rollout in most.
- **Text**: on 500 sentences of SST the default (average precision 0.682) is above the published rules (0.661, p < 0.05), AttnLRP (0.638), AttCAT
  (0.599), LeGrad (0.545) and everything without a gradient, all p < 0.01; gradient ⊙ attention (0.670) and `relevance_per_attention` (0.682) are level
  with it.
- **When weights become random**, the maps of every method change, some late: with a random head those of `lrp` and `relevance_rollout` still have a rank
  correlation of 0.98 and 0.97 with the trained model's, and with nothing trained left 0.77 and 0.72, so that what they show is in good part the picture. Those of
  `attnlrp`, `attcat` and gradient × input are at 0 from the head on. The default goes from 0.57 to 0.28, `relevance_per_attention` from 0.51 to 0.25,
  `gradient_attention` and `legrad` from 0.59 and 0.69 to 0. Maps of the attention alone cannot know the head.
- No method wins everywhere. The default stays; for large ViTs `relevance_per_attention` is worth a try first, for the shipped model AttnLRP.

## What the paper reports

Chefer, Gur and Wolf (CVPR 2021) report for ViT-B/16 on ImageNet and ImageNet-Segmentation (quoted from memory, not re-measured):

| | positive perturbation, predicted ↓ | negative ↑ | pixel accuracy ↑ | mAP ↑ | mIoU ↑ |
|---|---|---|---|---|---|
| rollout | 20.1 | 53.1 | 73.5 | 84.8 | 55.4 |
| raw attention | 24.0 | 45.6 | 67.8 | 80.2 | 46.4 |
| attention Grad-CAM | 34.1 | 41.5 | 64.4 | 71.6 | 40.8 |
| partial LRP | 19.6 | 50.5 | 76.3 | 84.7 | 57.9 |
| transformer attribution | 17.0 | 54.2 | 79.7 | 86.0 | 62.0 |

These are not comparable with the tables above: other weights (a ViT trained on ImageNet against zero-shot CLIP), other data (50,000 pictures and
4,276 segmentations with one large object each against a few dozen COCO objects, many of them small), and `start_layer=1`. With the
data at hand, `fastrel evaluate --data imagenet-seg:gtsegs_ijcv.mat --model vit_base_patch16_224 --metric segmentation --rules official --start-layer 1 …` runs
the paper's own protocol.
"""


def main(results: Path) -> None:
    """Write the page."""
    figures = ROOT / "docs" / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    parts = [INTRO, f"{READINGS}\n{(results / 'coco-readings.md').read_text().partition(chr(10) * 2)[2]}"]
    for folder, title, about in (one for one in SECTIONS if (results / one[0] / "results.md").exists()):
        parts.append(f"## {title}\n\n{about}\n\n{(results / folder / 'results.md').read_text().strip()}\n")
        plot = next(results / folder / name for name in ("curves.png", "scores.png") if (results / folder / name).exists())
        shutil.copy(plot, figures / f"{folder}-{plot.name}")
        parts.append(f"![{title}](figures/{folder}-{plot.name})\n")
    parts.append(f"{SANITY}\n{(results / 'sanity.md').read_text()}")
    parts.append(CONCLUSION)
    (ROOT / "docs" / "evaluation.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "results"))
