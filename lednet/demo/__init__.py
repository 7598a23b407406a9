"""The live page of `utils/demo_app.py`: label what a browser sends, and show it there."""
