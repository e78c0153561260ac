#!/usr/bin/env bash
# The runs of docs/run_log.md: recipe tiny, two processes, ZeRO 2, killed three times; and the same not killed.
set -u
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0
run="mplug pretrain --recipe tiny --devices 2 data.root=scenes engine.zero_stage=2 engine.threads=1
  data.sources.scenes.batch_size=8 stages.see.steps=200 stages.learn.steps=160 stages.all.steps=40
  optimizer.warmup_steps=40 run.save_every=20 run.log_every=2 run.evaluate_every=0
  evaluate.val.limit=40 evaluate.val_100.limit=40"
step() { tail -n 1 runs/killed/metrics.jsonl 2>/dev/null | grep -o '"step": [0-9]*' | head -n 1 | grep -o '[0-9]*'; }

mplug data scenes scenes --n 4000 --seed 0 -q
for kill_at in 95 245 373; do
  setsid $run run.folder=runs/killed >> run_log.txt 2>&1 &
  pid=$!
  until [ "$(step || true)" ] && [ "$(step)" -ge $kill_at ]; do sleep 0.3; kill -0 $pid || exit 1; done
  echo "=== SIGKILL to all processes at step $(step)" >> run_log.txt
  kill -9 -- -$pid
  wait $pid 2>/dev/null
done
$run run.folder=runs/killed >> run_log.txt 2>&1
$run run.folder=runs/whole > whole.txt 2>&1
cmp runs/killed/model/model.safetensors runs/whole/model/model.safetensors && echo "the same model, bit for bit"
mplug runs show runs/killed --png run_log.png
