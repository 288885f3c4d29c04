from dldkit import patches

patches.silence_flash_attention()
