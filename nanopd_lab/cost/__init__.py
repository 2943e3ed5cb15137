"""What a step costs: from operations and bytes, and from measured steps.

roofline, iteration, transfer_time, nanopd    the models; torch-free
grid, profile                                 which steps to time, and timing them through the engine
fitting, calibrate, derived                   from timed steps to coefficients, their check, nanoPD's numbers
files, hardware                               JSON files and `data/hardware`
"""
