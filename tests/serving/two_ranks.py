"""One of two ranks of `test_tools.test_two_ranks_give_the_numbers_of_one`: FOLDER tensor|expert|fsdp KIND..."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


def main() -> None:
    folder, way = Path(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group("gloo")
    sizes = {"tensor": {"tp_size": 2}, "expert": {"tp_size": 2, "ep_size": 2}, "fsdp": {"fsdp_size": 2}}[way]
    if "tp_size" in DistributedConfig.__dataclass_fields__:
        sharding = {"distributed_config": DistributedConfig(**sizes)}
    else:
        sharding = {"tp_plan": "auto"}
    for kind in sys.argv[3:]:
        tokens, loss, logits, norms = torch.load(folder / f"{kind}.pt")
        model = AutoModelForCausalLM.from_pretrained(folder / kind, trust_remote_code=True, **sharding)
        with torch.no_grad():
            found = model(tokens).logits
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
        made = model(tokens, labels=tokens).loss
        torch.testing.assert_close(made, loss, rtol=1e-5, atol=1e-5)
        made.backward()
        for key, parameter in model.named_parameters():
            if key in norms and parameter.grad is not None:
                grad = parameter.grad
                grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                torch.testing.assert_close(grad.norm(), norms[key], rtol=1e-3, atol=1e-5, msg=key)
        if torch.distributed.get_rank() == 0:
            print(kind, "equal", flush=True)
    torch.distributed.destroy_process_group()


main()
