"""Ten thousand transfers with random faults between real senders and receivers, and nothing may be left behind.

Two prefill sides and two decode sides of one process, joined by real or in-memory control streams and by the carrier
that is asked for. Every transfer is drawn from the seed (`soak_faults.draw`): its shape, its profile, and with some
probability a fault: owners that give up at any moment, pools and encoders that fail, frames that are damaged, forged,
repeated, reordered, links and streams that are cut, control messages that are lost, repeated, delayed, workers that
start again under a new epoch. What must hold:

- each side's owner is told exactly one outcome, within a deadline; acked means landed;
- what landed equals what was computed, bit for bit under lossless profiles; so does every single write;
- no access to a pool after the outcome; no write outside of blocks that the transfer owns; no block leaked;
- when a batch is over: no transfer, landing, queued part, lent slot or byte of credit remains, and after a last batch
  without faults, in which everything lands, and after `close`, no open link, thread, descriptor or shared memory.

Prints one JSON object; exits 1 when anything was violated. Run ``python -m benchmarks.kv_soak --help``.
"""

import argparse
import asyncio
import json
import logging
import sys
import time
import traceback
from collections import Counter

import torch

from benchmarks.soak_codecs import ENCODERS
from benchmarks.soak_faults import MAX_TOKENS, Fault, Plan, draw
from benchmarks.soak_fleet import DecodeSide, PrefillSide, World
from benchmarks.soak_leaks import held_by_process, leaked_since, leaks
from benchmarks.soak_pool import Ledger, Mischief
from core.errors import ServingError
from core.ids import TransferId
from core.layout import KvLayout
from kv_transfer.box import Box
from kv_transfer.codec import TORCH_DTYPES, FramePlace, default_decoders
from kv_transfer.config import KvTransferConfig
from kv_transfer.frame import section_spans

LAYOUT = KvLayout("soak", num_layers=4, num_kv_heads=2, head_dim=32, dtype="bfloat16", block_size=8)
OUTCOME_S = 30.0  # a deadline, not a duration
QUIET_S = 15.0
PEER_DOWN_S = 4.0
NUM_SIDES = 2


class Soak:
    """One run. All on one event loop."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ledger = Ledger()
        self.plans: dict[TransferId, Plan] = {}
        self.outcomes: Counter[str] = Counter()
        self.restarts = 0
        config = KvTransferConfig(
            backend=options.carrier,
            slot_bytes=16384,
            num_slots=3,
            credit_bytes=65536,
            lease_s=1.0,
            offer_timeout_s=0.6,
            connect_timeout_s=2.0,
            open_timeout_s=1.0,
            send_timeout_s=1.0,
        )
        num_blocks = options.concurrency * -(-MAX_TOKENS // LAYOUT.block_size)
        self.world = World(config, LAYOUT, self.ledger, self.plans, {}, num_blocks, options.control == "grpc")
        self.prefill = [PrefillSide(f"prefill-{index}", self.world) for index in range(NUM_SIDES)]
        self.decode = [DecodeSide(f"decode-{index}", self.world) for index in range(NUM_SIDES)]
        self.sides: list[PrefillSide | DecodeSide] = [*self.prefill, *self.decode]

    async def run(self) -> None:
        asyncio.get_running_loop().set_exception_handler(self._unhandled)
        for side in self.sides:
            await side.start()
        num_transfers, batch = self.options.transfers, self.options.batch
        for start in range(0, num_transfers, batch):
            await self._batch(range(start, min(start + batch, num_transfers)), self.options.fault_ratio)
            if self.ledger.violations:
                break
        if not self.ledger.violations:
            # The first transfer of a pair may still meet a link that the last fault broke; the second may not.
            await self._batch(range(num_transfers, num_transfers + 16), 0.0)
            before = self.outcomes.copy()
            await self._batch(range(num_transfers + 16, num_transfers + 80), 0.0)
            if (self.outcomes - before) != Counter({"acked/landed": 64}):
                self.ledger.violated(f"without faults, not everything landed: {self.outcomes - before}")
        for side in self.sides:
            await side.stop()
            if ends := side.links.open_ends():
                self.ledger.violated(f"{len(ends)} ends of links are open after close")

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        where = traceback.format_exception(error)[-6:] if isinstance(error, BaseException) else []
        self.ledger.violated(f"{context['message']}: {error!r} {' '.join(where)}")

    async def _batch(self, indices: range, fault_ratio: float) -> None:
        slots = asyncio.Semaphore(self.options.concurrency)

        async def one(index: int) -> None:
            async with slots:
                plan = draw(self.options.seed, index, LAYOUT, tuple(self.options.profiles), fault_ratio)
                self.plans[plan.transfer_id] = plan
                await self._transfer(plan)

        async with asyncio.TaskGroup() as group:
            for index in indices:
                group.create_task(one(index))
        await self._quiet()
        for side in self.sides:
            side.pool.check_quiet()
            side.outcomes.told.clear()
            side.links.has_lied = False
        self.plans.clear()
        self.world.truth.clear()

    # --- one transfer -------------------------------------------------------------------------------------------------

    async def _transfer(self, plan: Plan) -> None:
        rng, transfer_id, request_id = plan.rng, plan.transfer_id, plan.request_id
        source, target = rng.choice(self.prefill), rng.choice(self.decode)
        await self._until_up(source, target)
        self._compute(plan)
        source.pool.allocate(request_id, plan.num_tokens, _mischief(plan, Fault.SOURCE_FAILS))
        source.pool.fill(request_id)
        target.pool.allocate(request_id, plan.num_tokens, _mischief(plan, Fault.TARGET_FAILS))
        if not ENCODERS[plan.profile].is_lossless:
            target.pool.expect_lossy(request_id)

        is_offered = is_expected = False
        for is_offer in (plan.is_offered_first, not plan.is_offered_first):
            if is_offer:
                is_offered = not plan.strikes(Fault.NEVER_OFFERED) and await self._offer(plan, source, target)
                if not is_offered:
                    source.pool.free(request_id)
            else:
                is_expected = not plan.strikes(Fault.NEVER_EXPECTED) and await self._expect(plan, target)
                if not is_expected:
                    target.pool.free(request_id)
            await asyncio.sleep(rng.choice((0, 0, 0.001)))
        if is_offered:
            await self._push(plan, source, target)

        verdict = [
            await self._outcome(plan, side) if is_due else "nothing due"
            for side, is_due in ((source, is_offered), (target, is_expected))
        ]
        if verdict[0] == "acked" and verdict[1] != "landed":
            self.ledger.violated(f"{transfer_id}: acked, but {verdict[1]} at the receiver")
        self.outcomes["/".join(verdict)] += 1

    async def _push(self, plan: Plan, source: PrefillSide, target: DecodeSide) -> None:
        """Hand over part by part, as a prefill does; the fault strikes before one of the steps."""
        sender, parts = source.sender, plan.parts
        if plan.strikes(Fault.HOLE):
            self.ledger.injected(plan.fault)
            parts = parts[:-1]
        for step in range(len(parts) + 1):
            if step == plan.fault_at:
                await self._strike(plan, source, target)
            if step < len(parts):
                sender.push(plan.transfer_id, *parts[step])
                if step + 1 == plan.fault_at and plan.strikes(Fault.PUSHED_TWICE):
                    self.ledger.injected(plan.fault)
                    sender.push(plan.transfer_id, *parts[step])
            await asyncio.sleep(plan.rng.choice((0, 0, 0, 0.001)))
        sender.commit(plan.transfer_id, plan.index)
        if plan.fault_at > len(parts):
            await self._strike(plan, source, target)

    async def _strike(self, plan: Plan, source: PrefillSide, target: DecodeSide) -> None:
        """Commit the faults of owners, links and lives."""
        match plan.fault:
            case Fault.SENDER_ABORTS if plan.strikes(plan.fault):
                await source.sender.abort(plan.transfer_id, "soak")
            case Fault.RECEIVER_CANCELS if plan.strikes(plan.fault):
                await target.receiver.cancel(plan.transfer_id, "soak")
            case Fault.BOTH_GIVE_UP if plan.strikes(plan.fault):
                await asyncio.gather(
                    source.sender.abort(plan.transfer_id, "soak"), target.receiver.cancel(plan.transfer_id, "soak")
                )
            case Fault.LINK_CUT_BY_SENDER | Fault.LINK_CUT_BY_RECEIVER if plan.strikes(plan.fault):
                links = source.links if plan.fault is Fault.LINK_CUT_BY_SENDER else target.links
                if not links.cut(plan.rng):
                    return
            case Fault.STREAM_CUT if source.dialer.streams and plan.strikes(plan.fault):
                plan.rng.choice(source.dialer.streams).cut()
            case Fault.PAIR_MESSAGE_LOST | Fault.PAIR_MESSAGE_REPEATED | Fault.PAIR_MESSAGE_DELAYED:
                source.dialer.armed.append(plan)
                return
            case Fault.RECEIVER_RESTARTS if plan.strikes(plan.fault):
                await self._restart(target)
            case Fault.SENDER_RESTARTS if plan.strikes(plan.fault):
                await self._restart(source)
            case _:
                return
        self.ledger.injected(plan.fault)

    async def _restart(self, side: PrefillSide | DecodeSide) -> None:
        if side.is_restarting:
            return
        side.is_restarting = True
        await side.stop()
        await side.start()
        side.is_restarting = False
        self.restarts += 1

    def _compute(self, plan: Plan) -> None:
        shape = (LAYOUT.num_layers, 2, LAYOUT.num_kv_heads, plan.num_tokens, LAYOUT.head_dim)
        generator = torch.Generator().manual_seed(plan.index)
        self.world.truth[plan.request_id] = torch.randn(shape, generator=generator).to(TORCH_DTYPES[LAYOUT.dtype])

    async def _offer(self, plan: Plan, source: PrefillSide, target: DecodeSide) -> bool:
        due = source.outcomes.due(plan.transfer_id)
        try:
            await source.sender.offer(plan.transfer_id, plan.request_id, plan.num_tokens, target.peer)
        except ServingError:  # it is closing, or knows a newer incarnation of the peer
            due.cancel()
            return False
        return True

    async def _until_up(self, source: PrefillSide, target: DecodeSide) -> None:
        """Wait as a router would while the sender takes this peer to be down; not for ever."""
        health = source.sender._health.get(target.peer)
        if health is not None:
            await asyncio.sleep(min(PEER_DOWN_S, health.retry_after_s(time.monotonic())))

    async def _expect(self, plan: Plan, target: DecodeSide) -> bool:
        due = target.outcomes.due(plan.transfer_id)
        num_tokens = plan.num_tokens
        if plan.strikes(Fault.OTHER_LENGTH):
            self.ledger.injected(plan.fault)
            num_tokens += 1
        try:
            await target.receiver.expect(plan.transfer_id, plan.request_id, plan.held_tokens, num_tokens)
        except ServingError:  # it is closing, or the sender gave up first
            due.cancel()
            return False
        return True

    async def _outcome(self, plan: Plan, side: PrefillSide | DecodeSide) -> str:
        try:
            return await asyncio.wait_for(asyncio.shield(side.outcomes.told[plan.transfer_id]), OUTCOME_S)
        except TimeoutError:
            self.ledger.violated(f"{plan.transfer_id} ({plan.fault}): no outcome within {OUTCOME_S:g} s")
            return "nothing told"

    # --- between batches ----------------------------------------------------------------------------------------------

    async def _quiet(self) -> None:
        """Wait until nothing is under way; what is then still held has leaked."""
        deadline = time.monotonic() + QUIET_S
        while found := leaks(self.prefill, self.decode):
            if time.monotonic() > deadline:
                for leak in found:
                    self.ledger.violated(f"after a batch: {leak}")
                return
            await asyncio.sleep(0.01)


def _mischief(plan: Plan, failing: Fault) -> Mischief | None:
    if plan.fault is Fault.POOLS_ARE_SLOW:
        return Mischief(is_slow=True)
    if plan.fault is failing:
        return Mischief(fails_at=plan.rng.randint(1, 3), is_defect=plan.rng.random() < 0.5)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--transfers", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=500, help="transfers between two looks for leaks")
    parser.add_argument("--concurrency", type=int, default=48, help="transfers under way")
    parser.add_argument("--carrier", default="memory", help="a backend of the configuration")
    parser.add_argument("--control", choices=("memory", "grpc"), default="memory", help="carrier of control streams")
    parser.add_argument("--fault-ratio", type=float, default=0.5, help="share of transfers that meet a fault")
    parser.add_argument("--profiles", nargs="*", choices=sorted(ENCODERS), default=sorted(ENCODERS))
    options = parser.parse_args()
    logging.getLogger("kv_transfer").setLevel(logging.CRITICAL)  # it is loud about what is done to it here
    torch.set_num_threads(1)
    _warm(options.carrier, options.profiles)
    before = held_by_process()
    started = time.monotonic()
    soak = Soak(options)
    asyncio.run(soak.run())
    seconds = time.monotonic() - started
    for leak in leaked_since(before):
        soak.ledger.violated(leak)
    refused = {
        sample.labels["reason"]: int(sample.value)
        for side in soak.decode
        for metric in side.metrics.frames_refused.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    }
    summary = {
        "benchmark": "kv_soak",
        "passed": not soak.ledger.violations,
        "violations": soak.ledger.violations[:20],
        "num_violations": len(soak.ledger.violations),
        "transfers": sum(soak.outcomes.values()),
        "seconds": round(seconds, 1),
        "seed": options.seed,
        "carrier": options.carrier,
        "control": options.control,
        "profiles": options.profiles,
        "outcomes": dict(soak.outcomes.most_common()),
        "faults": dict(sorted(soak.ledger.faults.items())),
        "frames_refused": refused,
        "restarts": soak.restarts,
    }
    print(json.dumps(summary))
    return 1 if soak.ledger.violations else 0


def _warm(carrier: str, profiles: list[str]) -> None:
    """Compile what is compiled once and open what a process opens once and keeps, before anything is counted."""
    for name in profiles:
        kv = torch.zeros(1, 2, 1, 8, LAYOUT.head_dim, dtype=TORCH_DTYPES[LAYOUT.dtype])
        payload = torch.zeros(kv.nbytes, dtype=torch.uint8)
        encoded = ENCODERS[name].encode(kv, payload, FramePlace(Box(range(1), range(1), range(8)), 8, 1, 1))
        sections = [payload[span.start : span.stop] for span in section_spans(encoded.section_bytes)]
        default_decoders()[ENCODERS[name].codec_id].decode(encoded.params, sections, kv.shape, kv.dtype)
    options = argparse.Namespace(
        transfers=0, seed=0, batch=1, concurrency=16, carrier=carrier, control="grpc", profiles=["none"], fault_ratio=0
    )
    asyncio.run(Soak(options).run())


if __name__ == "__main__":
    sys.exit(main())
