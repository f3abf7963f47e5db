"What pip needs to know; every value comes from settings.ini"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
reader = ConfigParser(delimiters=['='], interpolation=None)
reader.read(here/'settings.ini', encoding='utf-8')
settings = reader['DEFAULT']
package = settings['lib_path']
readme = here/'README.md'
extras = {key.removesuffix('_requirements'): settings[key].split() for key in settings if key.endswith('_requirements')}

setup(
    name=settings['lib_name'],
    version=settings['version'],
    description=settings['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    author=settings['author'],
    author_email=settings['author_email'],
    url=settings['git_url'],
    keywords=settings['keywords'].split(),
    license=settings['license'].upper(),
    license_files=['LICENSE'],
    python_requires='>=' + settings['min_python'],
    # The top-level folder `models` is installed beside the code, as a package of data files that `find_models` looks into.
    packages=[package, 'musetalk_models'],
    package_dir={package: package, 'musetalk_models': 'models'},
    package_data={package: ['static/*'], 'musetalk_models': ['mini/*', 'mini/**/*', 'syncnet-mini/*', 'demo/*']},
    zip_safe=False,
    install_requires=settings['requirements'].split(),
    extras_require=extras,
    entry_points={
        'console_scripts': settings['console_scripts'].split(),
        'nbdev': [f'{package}={package}._modidx:d'],  # lets nbdev link names in the docs to their pages
    },
)
