from enum import Enum, auto


class TransferDirection(Enum):
    H2D = auto()
    D2H = auto()


class EngineKVFormat(Enum):
    NL_X_TWO_NB_BS_NH_HS = auto()
