from minitrain.cli.main import run

run()
