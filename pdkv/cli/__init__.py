"""The ``pdkv`` command: names its subcommands, and imports one only when it is run."""

from pdkv.cli.lazy import Subcommand, application

app = application(
    "pdkv moves MiniMax-M3's attention state from prefill to decode workers, and proves that all of it arrived.",
    (
        Subcommand("up", "pdkv.cli.serve", "Start a whole deployment on this machine: workers and router."),
        Subcommand("prefill", "pdkv.cli.serve", "Run a prefill worker."),
        Subcommand("decode", "pdkv.cli.serve", "Run a decode worker."),
        Subcommand("router", "pdkv.cli.serve", "Run the router that clients talk to."),
        Subcommand("generate", "pdkv.cli.generate", "Answer one prompt, through prefill and decode or undivided."),
        Subcommand("demo", "pdkv.cli.demo", "Show a transfer at work, with answers known beforehand."),
        Subcommand("demo-model", "pdkv.cli.demo", "Write the demo's checkpoint into a folder."),
        Subcommand("verify", "pdkv.cli.verify", "Prove that all state arrives, with controls that must fail."),
        Subcommand("matrix", "pdkv.cli.matrix", "Try every pair of rank counts in every kind of cache."),
        Subcommand("bench", "pdkv.cli.bench", "Measure what a move costs, beside other movers."),
        Subcommand("doctor", "pdkv.cli.doctor", "Look for what would keep a worker from serving."),
        Subcommand("describe", "pdkv.cli.doctor", "Show a worker's manifest, pages, leases and peers."),
        Subcommand("ping", "pdkv.cli.operating", "Ask a running daemon whether it is well."),
        Subcommand("top", "pdkv.cli.top", "Watch a router's workers: health, speed, pages, transfers."),
        Subcommand("drain", "pdkv.cli.operating", "Have a running daemon take no more requests."),
        Subcommand("manifest", "pdkv.cli.manifest", "Show what a worker holds, or compare two workers."),
        Subcommand("lease", "pdkv.cli.lease", "Look at a prefill worker's leases, or end one."),
        Subcommand("checkpoint", "pdkv.cli.checkpoint", "Look at a checkpoint, without loading it."),
        Subcommand("keys", "pdkv.cli.keys", "Make and show the keys by which workers know each other."),
        Subcommand("config", "pdkv.cli.config", "Show or check the configuration of a role."),
        Subcommand("metrics", "pdkv.cli.metrics", "List what daemons export at /metrics."),
        Subcommand("version", "pdkv.cli.version", "Print the version."),
    ),
    """
Examples:

  pdkv demo
  pdkv up --model ./checkpoint --prefill 1 --decode 1 --port 8000

Exit codes: 0 ok, 1 failure, 2 usage or configuration, 3 doctor or checkpoint
inspect found something amiss, 4 wrong answer, 5 could not tell, 6 peers do not fit together,
7 what ran at a signal did not end in --drain-timeout, or at a drain in --wait, 130/143 by signal.
""",
)

__all__ = ["app"]
