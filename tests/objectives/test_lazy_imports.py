import subprocess
import sys


def test_objectives_load_no_heavy_library_before_a_model_is_used():
    heavy = ("datasets", "diffusers", "lightning", "timm", "torchmetrics", "transformers")
    code = f"import sys, tokenlearn.objectives, tokenlearn.models.attributes; print(*set({heavy}) & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == []
