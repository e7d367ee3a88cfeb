"""The known words of which names and values are made, beside made-up ones."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


VERBS = _words(
    """
    get find list show create delete update send book open close start stop check search read
    write move copy rename order cancel schedule translate convert count sort filter print save
    load lock unlock add remove track plan compare measure reset enable disable approve reject
    share invite assign archive restore export import call pay ship choose play pause record
    scan sign test tag merge split fetch lookup query set clear draw paint wash clean cook bake
    build repair rent sell buy mail post watch drive fly walk feed water charge install remind
    notify verify review rate rank score group
    """
)
NOUNS = _words(
    """
    weather user order invoice ticket room flight train hotel table song playlist movie book
    note task event meeting calendar message email file folder image photo video report chart
    account balance payment card bank stock price product item cart shop recipe meal coffee lamp
    light door window alarm timer clock sensor camera printer server database backup log queue
    job branch issue project team member contact address map route car bike bus parking garden
    plant pet dog cat doctor patient lesson course exam student teacher library museum concert
    game player result news article page comment language word translation currency parcel
    package warehouse shelf box bottle kitchen bridge tower river mountain forest beach island
    planet rocket robot engine wheel pump valve switch cable battery screen keyboard
    """
)
TEXT_PARAMETERS = _words(
    """
    name city location title text subject color size street country language target source owner
    user author topic category label format mode level team project file folder path day month
    zone currency code key tag group room device channel host region brand model shape style
    theme status place town person customer sender recipient station airport hotel street
    district planet genre artist album color1 material flavor vendor reason comment note alias
    nickname surname password domain server cluster bucket branch version package module symbol
    origin destination keyword phrase prefix suffix template profile
    """
)
NUMBER_PARAMETERS = _words(
    """
    count amount number year age price limit days hours minutes quantity width height page score
    rating weight depth speed volume seats nights rooms guests floor row column offset index
    total budget distance copies rounds points degrees percent seconds weeks months pages people
    tickets
    """
)
FLAGS = _words(
    """
    urgent public private active express dry_run force silent paid gift notify loud fast vegan
    """
)
CHOICES = _words(
    """
    celsius fahrenheit low medium high red green blue small large asc desc morning noon evening
    economy business first json csv xml left right monday tuesday friday draft final cash card
    """
)
FIRST_NAMES = _words(
    """
    Ana Ben Carla David Elena Felix Greta Hugo Ines Jonas Klara Liam Maria Nora Oscar Paula
    Quentin Rosa Sam Tina Uwe Vera Walter Xenia Yusuf Zoe Aisha Boris Chloe Diego Emma Farid
    Gina Hana Ivan Julia Kofi Lena Marco Nina Otto Priya Ravi Sofia Tom Ursula Victor Wendy Yara
    Zack Alice Bob Charlie Dora Erik Fiona George Helen Isaac Jane Kevin Laura Mike Nadia Olga
    Peter Rachel Steve Tara Vincent Adam Bella Cyril Daria Edgar Frida Gustav Heidi Igor Judith
    Karl Luisa Mila Noah Omar Pia Rita Silvia Theo Ulla
    """
)
CITIES = _words(
    """
    Paris London Berlin Madrid Rome Vienna Oslo Lima Cairo Tokyo Seoul Delhi Quito Lagos Accra
    Dakar Tunis Rabat Sofia Prague Dublin Lisbon Athens Warsaw Moscow Kyiv Riga Minsk Zagreb
    Bern Geneva Zurich Basel Lyon Nice Milan Turin Naples Venice Munich Hamburg Cologne Dresden
    Leipzig Bremen Boston Chicago Dallas Denver Miami Austin Seattle Houston Phoenix Toronto
    Montreal Ottawa Havana Bogota Caracas Santiago Sydney Perth Brisbane Auckland Manila Jakarta
    Hanoi Bangkok Mumbai Chennai Karachi Tehran Baghdad Ankara Izmir Beirut Amman Doha Dubai
    Kabul Osaka Kyoto Nagoya Beijing Shanghai Singapore Nairobi Kampala Harare Lusaka Luanda
    """
)
TWO_WORDS = _words(
    """
    New Old Great Little Blue Green Red Silver Golden North South East West Upper Lower Saint
    Port Fort Lake Black White Royal
    """
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

COMMON = frozenset((*VERBS, *NOUNS)) | frozenset(
    _words(
        """
        get_weather get_current_weather weather fetch_weather get_time get_current_time current_time
        search search_web web_search get_user find_user lookup_user get_stock_price stock_price city
        location place zone query text q name user username symbol ticker company unit age color pet
        town food number path mode reason morning evening csv weight level total medium high low
        true false json final channel day time
        """
    )
)
"""Words and names of functions and parameters that are part of prose or that newcomers try: never
held out."""
