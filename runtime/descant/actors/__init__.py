"""The actors of the server process, one file each; the engines behind them are in the child processes."""
