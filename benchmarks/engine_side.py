"""One engine of the comparison, in a process of its own: reads work from stdin, answers with seconds on stdout.

Run by `benchmarks.engine`, for vLLM with the interpreter of its own environment; so a side imports its engine late and
this module imports nothing else of Tandem. One line of JSON each way:

1. to the side: ``{"prompts": [[token, ...], ...], "new_tokens": n}``: generate n tokens for each prompt, greedily
2. from the side: ``{"ready": version}`` once, then ``{"seconds": s, "tokens": generated}`` per piece of work, or
   ``{"error": one line}``
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

Generate = Callable[[list[list[int]], int], int]  # prompts, new tokens of each -> tokens generated


@dataclass(frozen=True)
class SideConfig:
    """What every side gets alike. `batch_tokens` is the budget of one step where an engine has one."""

    side: str
    model: str
    dtype: str
    threads: int
    max_model_len: int
    max_requests: int
    batch_tokens: int


def tandem(config: SideConfig) -> tuple[str, Generate]:
    """The whole engine: scheduler, paged cache, model, sampler."""
    from pathlib import Path

    from engine.config import PROCESS_ENVIRONMENT

    os.environ.update(PROCESS_ENVIRONMENT)  # before torch is loaded; vLLM has its own such settings below

    from core.ids import RequestId
    from core.request import GenerateRequest, SamplingParams
    from engine.config import EngineConfig, ModelConfig
    from engine.engine import Engine

    engine = Engine.load(
        ModelConfig(path=Path(config.model), dtype=config.dtype),
        EngineConfig(
            num_threads=config.threads,
            max_num_requests=config.max_requests,
            max_batch_tokens=config.batch_tokens,
            kv_cache_bytes=2**30,
            prefix_cache=False,
        ),
    )
    count = 0

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        nonlocal count
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        for prompt in prompts:
            count += 1
            engine.add(GenerateRequest(RequestId(f"bench-{count}"), tuple(prompt), sampling))
        generated = 0
        while engine.has_work():
            generated += sum(len(output.tokens) for output in engine.step())
        return generated

    return "this commit", generate


def transformers_generate(config: SideConfig) -> tuple[str, Generate]:
    """`generate` with its KV cache and sdpa; all prompts of a batch are of one length, so nothing is padded."""
    import torch
    import transformers

    torch.set_num_threads(config.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        config.model, dtype=getattr(torch, config.dtype), attn_implementation="sdpa"
    ).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        inputs = torch.tensor(prompts)
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return int(out.shape[0] * (out.shape[1] - inputs.shape[1]))

    return transformers.__version__, generate


def transformers_continuous(config: SideConfig) -> tuple[str, Generate]:
    """`generate_batch` with a manager that lives on between batches."""
    import torch
    import transformers
    from transformers.generation import ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(config.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        config.model, dtype=getattr(torch, config.dtype), attn_implementation="sdpa"
    ).eval()
    page_size = 32
    batching = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=4 * config.max_requests * config.max_model_len // page_size // 16,
        max_batch_tokens=config.batch_tokens,
        max_requests_per_batch=config.max_requests,  # or it is sized for the first batch
        allow_block_sharing=False,
    )
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=64)

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        results = model.generate_batch(
            prompts,
            generation_config=generation,
            continuous_batching_config=batching,
            max_new_tokens=new_tokens,
            persistent_manager=True,
        )
        return sum(len(result.generated_tokens) for result in results.values())

    return transformers.__version__, generate


def vllm(config: SideConfig) -> tuple[str, Generate]:
    """vLLM's CPU build with its defaults (compiled), all given threads bound to a core each."""
    cores = sorted(os.sched_getaffinity(0))[: config.threads]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))  # the default leaves a core idle
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    import vllm as package  # type: ignore[import-not-found,unused-ignore]

    llm = package.LLM(
        model=config.model,
        dtype=config.dtype,
        skip_tokenizer_init=True,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_requests,
        max_num_batched_tokens=max(config.batch_tokens, config.max_model_len),
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        sampling = package.SamplingParams(
            temperature=0.0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return sum(len(result.outputs[0].token_ids) for result in llm.generate(inputs, sampling, use_tqdm=False))

    return str(package.__version__), generate


SIDES: dict[str, Callable[[SideConfig], tuple[str, Generate]]] = {
    "tandem": tandem,
    "transformers_generate": transformers_generate,
    "transformers_continuous": transformers_continuous,
    "vllm": vllm,
}


def main() -> None:
    """Serve one side until stdin closes."""
    config = SideConfig(**json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever an engine prints goes to stderr

    def answer(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        version, generate = SIDES[config.side](config)
        answer(ready=version)
        for line in sys.stdin:
            work = json.loads(line)
            start = time.perf_counter()
            tokens = generate(work["prompts"], work["new_tokens"])
            answer(seconds=time.perf_counter() - start, tokens=tokens)
    except Exception as error:  # a peer may fail in any way; the comparison goes on without it, and says why
        line = next((line for line in str(error).splitlines() if line.strip()), "")
        answer(error=f"{type(error).__name__}: {line.strip()[:300]}")
        raise


def describe(config: SideConfig) -> str:
    """Return the argument of a side's process."""
    return json.dumps(asdict(config))


if __name__ == "__main__":
    main()
