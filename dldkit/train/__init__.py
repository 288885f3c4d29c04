from dldkit import patches

patches.prepare_espnet()
